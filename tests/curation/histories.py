"""Everything that has ever been recorded about a pair."""

from transformers_minigpt4.curation.database import fetch, result_of
from transformers_minigpt4.curation.records import Result
from transformers_minigpt4.curation.store import Project


def history(project: Project, pair_id: int) -> list[tuple[str, Result]]:
    """Every result that a pair has ever had, as `(step, result)`, oldest first."""
    rows = fetch(project.connection(), "SELECT * FROM history WHERE pair_id = ? ORDER BY id", (pair_id,))
    return [(row["step"], result_of(row)) for row in rows]
