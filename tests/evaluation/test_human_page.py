"""People as judges: a blind shuffled sheet, tables out and in, counts, and the page in a real browser."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import typer
from judged_files import write_advanced
from typer.testing import CliRunner

from transformers_minigpt4.evaluation.answering import AnswerStore
from transformers_minigpt4.evaluation.compare import compare_results
from transformers_minigpt4.evaluation.human_commands import COMMANDS
from transformers_minigpt4.evaluation.human_judging import (
    Sheet,
    count,
    export_csv,
    import_csv,
    make_sheet,
    write_verdicts,
)
from transformers_minigpt4.evaluation.results import (
    complete_records,
    data_fingerprint,
    describe_task,
    read_results,
    summarize,
    write_results,
)
from transformers_minigpt4.evaluation.tasks import load_task


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_run(folder: Path, model: str, questions, answers) -> Path:
    """What an evaluation of `advanced` without judge leaves."""
    task = load_task("advanced")
    records = complete_records(task, questions, task.score(questions, answers, None), answers)
    AnswerStore(folder / "answers", task.name).finish(
        {
            "id": question.id,
            "key": question.id,
            "prompt": question.prompt,
            "images": list(question.images),
            "reference": question.reference,
            **({"answer": answers[question.id]} if question.id in answers else {"error": "broken"}),
            "record": record,
        }
        for question, record in zip(questions, records)
    )
    entry = describe_task(task, questions, "advanced", None) | summarize(task, questions, records)
    checkpoint = {"id": model, "fingerprint": f"of {model}"}
    write_results(folder, checkpoint, {"advanced": entry, "gqa": {"metrics": {"accuracy": 1.0}}})
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two models over 4 tasks × 2 images; `beta` could not answer one question."""
    questions = load_task("advanced").questions(write_advanced(tmp_path / "data"))
    made = []
    for model in ("alpha", "beta"):
        answers = {q.id: f"={model.upper()[::-1]} on {q.id} <b>bold</b>" for q in questions}
        if model == "beta":
            del answers["poem/01.png"]
        made.append(write_run(tmp_path / model, model, questions, answers))
    return made


@pytest.fixture
def sheet(runs, tmp_path):
    return make_sheet(runs, tmp_path / "sheet")


def test_a_sheet_is_shuffled_and_complete(sheet, runs, tmp_path):
    assert len(sheet.items) == 16 and len(sheet.asked) == 15
    models = [item.model for item in sheet.items]
    assert models != sorted(models) and len({item.id for item in sheet.items}) == 16
    assert len(list((sheet.folder / "images").iterdir())) == 8
    again, other = make_sheet(runs, tmp_path / "again"), make_sheet(runs, tmp_path / "other", seed=1)
    assert [item.id for item in again.items] == [item.id for item in sheet.items]
    assert [(i.model, i.question) for i in other.items] != [(i.model, i.question) for i in sheet.items]
    # An image has one name, whichever model answered.
    images = {item.question: item.image for item in sheet.items}
    assert all(item.image == images[item.question] for item in sheet.items)


def test_counts_by_hand(sheet):
    """Anna judges all, yes for alpha alone; Ben says no to alpha's memes and yes to beta's recipes."""
    for item in sheet.asked:
        sheet.decide(item.id, " Anna ", item.model == "alpha")
        if item.task in ("meme", "recipe") and (item.model == "alpha") == (item.task == "meme"):
            sheet.decide(item.id, "ben", item.task == "recipe")
    counts = count(sheet)
    alpha, beta = counts["models"]["alpha"], counts["models"]["beta"]
    assert alpha["poem"] == {"success": 2, "judged": 2, "undecided": 0, "answers": 2}
    assert alpha["meme"] == {"success": 0, "judged": 0, "undecided": 2, "answers": 2}  # one yes, one no each
    assert beta["recipe"] == {"success": 0, "judged": 0, "undecided": 2, "answers": 2}
    assert beta["poem"] == {"success": 0, "judged": 2, "undecided": 0, "answers": 2}  # one of them has no answer
    assert counts["people"] == {"anna": 15, "ben": 4} and counts["agreement"] == 0.0
    carl = {item.id: item.task == "recipe" for item in sheet.asked}
    sheet.decide_all("carl", carl.items())
    counts = count(sheet)
    assert counts["models"]["alpha"]["meme"]["success"] == 0 and counts["models"]["alpha"]["meme"]["judged"] == 2
    assert counts["models"]["beta"]["recipe"]["success"] == 2


def test_a_later_decision_holds_and_a_torn_line_is_left_out(sheet):
    key = sheet.asked[0].id
    sheet.decide(key, "anna", True)
    with (sheet.folder / "decisions.jsonl").open("a") as file:
        file.write('{"item": "torn')
    assert sheet.decisions() == {"anna": {key: True}}
    sheet.decide(key, "anna", False)
    assert Sheet(sheet.folder).decisions() == {"anna": {key: False}}
    assert sheet.next_for("anna") == sheet.asked[1]


def test_tables_out_and_in(sheet, tmp_path):
    table = tmp_path / "sheet.csv"
    assert export_csv(sheet, table) == 15
    text = table.read_text()
    assert "alpha" not in text and "beta" not in text  # blind
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["answer"].startswith("'=")  # shown, not computed
    for number, row in enumerate(rows[:6]):
        row["success"] = ("yes", "No", "1", "0", "TRUE", "")[number]
    write_table(table, rows)
    assert import_csv(sheet, table, "Anna") == 5
    assert list(sheet.decisions()["anna"].values()) == [True, False, True, False, True]
    assert export_csv(sheet, table, "anna") == 15
    with table.open(newline="") as file:
        assert [row["success"] for row in csv.DictReader(file)][:6] == ["yes", "no", "yes", "no", "yes", ""]


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_a_bad_table_changes_nothing(sheet, tmp_path):
    table = tmp_path / "sheet.csv"
    good = {"item": sheet.asked[0].id, "success": "yes"}
    for rows, message in (
        ([good, {"item": sheet.asked[1].id, "success": "maybe"}], r"row 3 .* says 'maybe'; write yes or no"),
        ([good, good], "repeats the item"),
        ([good, {"item": "zzz", "success": "no"}], "has no item 'zzz'"),
        ([{"id": "1", "success": "no"}], "has no column 'item'"),
    ):
        write_table(table, rows)
        with pytest.raises(ValueError, match=message):
            import_csv(sheet, table, "anna")
    assert sheet.decisions() == {}


def test_verdicts_flow_into_the_results(sheet, runs):
    for item in sheet.asked:
        if item.task != "meme":
            sheet.decide(item.id, "anna", item.model == "alpha")
    assert write_verdicts(sheet) == runs
    alpha, beta = (read_results(run)["tasks"] for run in runs)
    assert alpha["advanced"]["metrics"]["successes/poem"] == 2 and alpha["advanced"]["metrics"]["success"] == 100
    assert beta["advanced"]["metrics"]["success"] == 0 and beta["advanced"]["metrics"]["judged/poem"] == 2
    assert alpha["advanced"]["metrics"]["judged/meme"] == 0
    assert alpha["advanced"]["judge"] == {"people": 1} and alpha["gqa"] == {"metrics": {"accuracy": 1.0}}
    comparison = compare_results(runs, ["advanced"])
    assert next(d.value for d in comparison.differences if d.metric == "successes/poem") == -2
    lines = [json.loads(line) for line in (runs[0] / "answers" / "advanced.jsonl").read_text().splitlines()]
    assert {line["record"]["success"] for line in lines} == {1, None}
    # Answers of another run than the sheet's are left alone.
    lines[0]["answer"] = "changed"
    (runs[0] / "answers" / "advanced.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="other answers than the sheet"):
        write_verdicts(sheet)


def test_a_sheet_knows_its_runs_from_any_folder(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make_sheet([Path("alpha"), Path("beta")], Path("sheet"))
    assert str(tmp_path) not in (tmp_path / "sheet" / "sheet.json").read_text()  # it is handed to others
    made.decide(made.asked[0].id, "anna", True)
    monkeypatch.chdir(tmp_path / "sheet")
    assert write_verdicts(Sheet(Path("."))) == runs


def test_a_missing_image_leaves_no_half_a_sheet(runs, tmp_path):
    (tmp_path / "data" / "recipe" / "00.png").rename(tmp_path / "kept.png")
    with pytest.raises(ValueError, match=r"recipe/00.png' has moved since the evaluation; put it back"):
        make_sheet(runs, tmp_path / "sheet")
    (tmp_path / "kept.png").rename(tmp_path / "data" / "recipe" / "00.png")
    assert len(make_sheet(runs, tmp_path / "sheet").asked) == 15


def test_runs_that_do_not_go_together(runs, tmp_path):
    with pytest.raises(ValueError, match="is not empty"):
        make_sheet(runs, tmp_path / "data")
    results = read_results(runs[1])
    results["tasks"]["advanced"]["fingerprint"] = data_fingerprint([])
    write_results(runs[1], results["checkpoint"], results["tasks"])
    with pytest.raises(ValueError, match="alpha and beta were asked about different questions"):
        make_sheet(runs, tmp_path / "new")
    write_results(runs[1], results["checkpoint"], {})
    with pytest.raises(ValueError, match="has no results of advanced"):
        make_sheet(runs, tmp_path / "new")
    with pytest.raises(ValueError, match="no sheet in"):
        Sheet(tmp_path)


def test_two_runs_of_one_name_are_told_apart_by_folder(runs, tmp_path):
    results = read_results(runs[1])
    write_results(runs[1], {**results["checkpoint"], "id": "alpha"}, results["tasks"])
    sheet = make_sheet(runs, tmp_path / "sheet")
    assert {item.model for item in sheet.items} == {"alpha", "beta"}


def test_the_commands(runs, tmp_path):
    """make, export, import, count --write: Table 1 on the screen and in the results."""
    app = typer.Typer()
    for name, command in COMMANDS.items():
        app.command(name)(command)

    def call(*words):
        done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})
        assert done.exit_code == 0, done.exception
        return done.output

    folder, table = tmp_path / "people", tmp_path / "sheet.csv"
    assert "15 answers to judge" in call("make", *runs, "--output", folder)
    call("export", folder, "--output", table)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    models = {item.id: item.model for item in Sheet(folder).items}
    for row in rows:
        row["success"] = "yes" if models[row["item"]] == "alpha" else "no"
    write_table(table, rows)
    assert "15 decisions of anna" in call("import", folder, table, "--person", "anna")
    screen = call("count", folder, "--write")
    cells = [line.replace("│", " ").split() for line in screen.splitlines() if "alpha" in line or "beta" in line]
    assert cells[0] == ["alpha", "2/2", "2/2", "2/2", "2/2", "0"]
    assert cells[1] == ["beta", "0/2", "0/2", "0/2", "0/2", "0"]
    assert "judges: anna (15)" in screen and f"written into {runs[1]}" in screen.replace("\n", "")
    assert read_results(runs[0])["tasks"]["advanced"]["metrics"]["success"] == 100


@pytest.fixture
def page(sheet):
    """The sheet's page in a real browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    from transformers_minigpt4.evaluation.human_page import serve_sheet

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with serve_sheet(sheet) as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.goto(server.url)
        yield page
        browser.close()


NAME = "#name input, #name textarea"


def test_judging_in_a_browser(sheet, page):
    """By key and by button; back; a reload resumes without asking the name again; nothing reveals the model."""
    from playwright.sync_api import expect

    first, second, third = sheet.asked[:3]
    page.locator(NAME).fill("Anna")
    page.locator("#start").click()
    answer = page.locator("#answer")
    expect(answer).to_have_text(first.answer)  # `<b>` as characters
    expect(page.locator(".image img")).to_have_js_property("naturalWidth", 8)
    page.locator("#yes").click()
    expect(answer).to_have_text(second.answer)
    page.keyboard.press("n")
    expect(answer).to_have_text(third.answer)
    page.keyboard.press("b")
    expect(answer).to_have_text(second.answer)
    expect(page.locator("#progress")).to_contain_text("You said no.")
    page.keyboard.press("y")
    expect(answer).to_have_text(third.answer)
    assert "alpha" not in page.content() and "beta" not in page.content()
    page.reload()
    expect(answer).to_have_text(third.answer)
    expect(page.locator("#progress")).to_contain_text("2 of 15")
    assert sheet.decisions() == {"anna": {first.id: True, second.id: True}}


def test_letters_typed_after_enter_are_keys_and_no_part_of_the_name(sheet, page):
    from playwright.sync_api import expect

    page.locator(NAME).fill("Anna")
    page.keyboard.press("Enter")
    page.keyboard.press("y")  # nothing is shown yet, or the first item: never a letter of the name
    answer = page.locator("#answer")
    expect(answer).not_to_be_empty()
    expect(page.locator(NAME)).to_have_value("anna")
    expect(page.locator(NAME)).to_be_disabled()
    expect(page.locator("#start")).to_be_disabled()
    for key in "yn":
        shown = answer.inner_text()
        page.keyboard.press(key)
        expect(answer).not_to_have_text(shown)
    assert list(sheet.decisions()) == ["anna"]


def test_a_changed_name_box_changes_no_judge(sheet, page):
    """The box is locked; even if its content changes, decisions stay with the person who started."""
    from playwright.sync_api import expect

    page.locator(NAME).fill("Anna")
    page.locator("#start").click()
    expect(page.locator("#answer")).to_have_text(sheet.asked[0].answer)
    typed = "box.disabled = false; box.value = 'mallory'; box.dispatchEvent(new Event('input', {bubbles: true}))"
    page.locator(NAME).evaluate(f"box => {{ {typed} }}")
    page.keyboard.press("y")
    expect(page.locator("#answer")).to_have_text(sheet.asked[1].answer)
    assert sheet.decisions() == {"anna": {sheet.asked[0].id: True}}
