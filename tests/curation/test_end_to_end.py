"""The complete pipeline on the toy world, as docs/guides/curate.md shows it: from stage 1 to a better stage 2."""

import threading

import pytest
from datasets import load_from_disk
from typer.testing import CliRunner

from transformers_minigpt4.cli import app
from transformers_minigpt4.curation.store import Project
from transformers_minigpt4.demo import reviewer
from transformers_minigpt4.demo.endpoint import MODEL, make_server
from transformers_minigpt4.demo.failures import measure


IMAGES, STEPS = 240, 60


def minigpt4(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def endpoint(monkeypatch):
    """The demo's server, as `python -m transformers_minigpt4.demo.endpoint` starts it."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = make_server(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_curation_makes_stage_2_better(demo_run, endpoint, tmp_path):
    project, stage1, stage2 = tmp_path / "curation", demo_run / "stage1", tmp_path / "stage2"
    source = "python:transformers_minigpt4.demo.curation_images:images"
    minigpt4(
        *("curate", "init", project, "--source", source, "--checkpoint", stage1, "--images", IMAGES),
        *("--repair-model", MODEL, "--repair-base-url", endpoint),
    )
    with open(project / "curation.yaml", "a", encoding="utf-8") as file:
        file.write("batch_size: 80\nmax_new_tokens: 60\nrules: {duplicate_text: false}\n")
    said = minigpt4("curate", "run", project)
    assert f"{IMAGES} images sampled" in said and "wait for people" in said
    minigpt4("curate", "review", project, "--export", tmp_path / "waiting.csv")
    reviewer.main([str(tmp_path / "waiting.csv"), str(tmp_path / "decisions.csv")])
    minigpt4("curate", "review", project, "--import", tmp_path / "decisions.csv")
    said = minigpt4("curate", "run", project)  # builds what is accepted
    assert "0 described" in said and "repair: nothing to do" in said and "0 verdicts new or changed" in said
    status = minigpt4("curate", "status", project)
    with Project.open(project) as opened:
        funnel = opened.funnel()
    assert funnel.sampled == IMAGES and 80 <= funnel.accepted < IMAGES
    assert str(funnel.accepted) in status and "rejected" in status
    assert len(load_from_disk(project / "build" / "dataset")) == funnel.accepted

    minigpt4(
        *("train", "tiny_stage2", "--model_name_or_path", stage1, "--requires_stage1", "false"),
        *("--sources", f"cc_sbu_align:{project}/build/cc_sbu_align", "--output_dir", stage2),
        *("--max_steps", STEPS, "--warmup_steps", STEPS // 8, "--save_strategy", "no"),
    )
    before, after = measure(stage1, 60), measure(stage2, 60)
    assert before["failed"] > 0.2
    assert after["failed"] < 0.6 * before["failed"]
    assert after["attributes"] > before["attributes"] + 0.08
