"""Runs the steps of a curation that need no people, one after the other."""

from collections.abc import Callable

from .build import run_build
from .config import CurationConfig
from .filter import project_rules, run_filter
from .generate import run_generate
from .repair import run_repair
from .report import run_report
from .status import status_text
from .store import Project


def run_all(
    project: Project, config: CurationConfig, progress: bool = True, say: Callable[[str], object] = print
) -> None:
    """
    Generate, repair if a model is named, filter, report; and build, if there is something to build from.

    Each step does only what has not been done, so that a second run is short. Finished work is kept if a step raises.

    Args:
        project: Open.
        config: Its settings.
        progress: Whether to show bars on a terminal.
        say: Called with a line or two on what each step did.

    Raises:
        CurationError: before the first step, for settings of any step that cannot work; if the repair failed for every
            text; and what the steps raise.
    """
    # Mistakes in what only a later step reads are better reported before hours of describing.
    project_rules(config)
    say(str(run_generate(project, config, progress)))
    if config.repairs:
        repaired = run_repair(project, config, progress)
        say(str(repaired))
        repaired.check()
    say(str(run_filter(project, config, progress)))
    say(f"report in {run_report(project, config)}")
    funnel = project.funnel()
    review = funnel.steps[-1]
    if funnel.accepted or (config.build_unreviewed and review.reached):
        say(str(run_build(project, config, progress)))
    say(status_text(project))
    if review.waiting:
        say(f"{review.waiting:,} pairs wait for people: minigpt4 curate review {project.folder}")
