"""The judged tasks: their data forms, prompts to the letter, scores counted by hand, and bad input."""

import json

import pytest
from judged_files import write_advanced, write_coco, write_image, write_lines
from scripted_endpoint import ScriptedEndpoint, user_text

from transformers_minigpt4.evaluation.evaluator import Question
from transformers_minigpt4.evaluation.results import complete_records, summarize
from transformers_minigpt4.evaluation.tasks import load_task
from transformers_minigpt4.evaluation.tasks.advanced import PROMPTS, verdict_columns
from transformers_minigpt4.evaluation.tasks.coco_coverage import captioned_images
from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import ChatSettings


def scored(name, questions, answers, respond):
    """Records and metrics by a judge that answers as `respond` says, and the judge's requests."""
    task = load_task(name)
    with (
        ScriptedEndpoint(lambda body: respond(user_text(body))) as endpoint,
        open_chat_model(ChatSettings("judge", base_url=endpoint.base_url, max_retries=0)) as judge,
    ):
        records = complete_records(task, questions, task.score(questions, answers, judge), answers)
    json.dumps(records)
    return records, summarize(task, questions, records)["metrics"], [user_text(body) for body in endpoint.requests]


def test_prompts_and_arguments_to_the_letter():
    """The paper's own words, as the facts have them; a change here makes results incomparable."""
    tasks = {name: load_task(name) for name in ("advanced", "coco_coverage", "stage2_failures", "llava_bench")}
    assert {name: (dict(task.prompts), dict(task.generation), task.primary) for name, task in tasks.items()} == {
        "advanced": (
            {
                "meme": "Explain why this meme is funny.",
                "recipe": "How should I make something like this?",
                "advertisement": "Help me draft a professional advertisement for this.",
                "poem": "Can you craft a beautiful poem about this image?",
            },
            {"max_new_tokens": 300},
            "success",
        ),
        "coco_coverage": ({"describe": "Describe this image in detail."}, {"max_new_tokens": 300}, "covered"),
        "stage2_failures": (
            {
                "detail": "Describe the image in detail.",
                "poem": "Can you write a beautiful poem about this image?",
            },
            {"max_new_tokens": 300},
            "failure",
        ),
        "llava_bench": ({"question": "{text}"}, {"max_new_tokens": 1024}, "relative_score"),
    }
    assert tasks["coco_coverage"].judge_prompts["covers"] == (
        "There is one image caption1 '{caption}', and there is another image caption2 '{answer}'. Does image caption2 "
        "cover all the objects and visual relations shown in image caption1? Only answer yes or no without any "
        "explanation."
    )


class TestAdvanced:
    def test_questions(self, tmp_path):
        questions = load_task("advanced").questions(write_advanced(tmp_path))
        assert [question.id for question in questions[:3]] == ["meme/00.png", "meme/01.png", "recipe/00.png"]
        assert len(questions) == 8 and questions[0].prompt == "Explain why this meme is funny."
        assert questions[0].reference == {"description": "A meme numbered 00.png."}
        assert len(load_task("advanced").questions(tmp_path, 3)) == 3

    def test_scores(self, tmp_path):
        """2 images per task: all poems good, one recipe, a meme unreadable, an advertisement without answer."""
        questions = load_task("advanced").questions(write_advanced(tmp_path))
        answers = {q.id: f"An answer about {q.id}" for q in questions if q.id != "advertisement/01.png"}

        def respond(text):
            if "meme/01.png" in text or "cannot be used" in text:
                return "Hard to say."
            good = "poem/" in text or "recipe/00.png" in text
            return "yes" if good else "no"

        records, metrics, asked = scored("advanced", questions, answers, respond)
        assert metrics["success"] == pytest.approx(100 * 3 / 7)
        counts = {
            task: (metrics[f"successes/{task}"], metrics[f"judged/{task}"]) for task in ("meme", "recipe", "poem")
        }
        assert counts == {"meme": (0, 1), "recipe": (1, 2), "poem": (2, 2)}
        assert (metrics["successes/advertisement"], metrics["judged/advertisement"]) == (0, 2)
        assert metrics["unreadable"] == pytest.approx(100 / 7)
        assert records[1]["success"] is None and records[1]["judge"] == "Hard to say."
        assert any("A meme numbered 00.png." in text and "Explain why this meme is funny." in text for text in asked)

    def test_without_a_judge_nothing_is_decided(self, tmp_path):
        task = load_task("advanced")
        questions = task.questions(write_advanced(tmp_path, described=False))
        answers = {q.id: "text" for q in questions[1:]}
        records = task.score(questions, answers, None)
        assert [record["success"] for record in records] == [0] + [None] * 7  # the first has no answer
        assert "success" in summarize(task, questions, complete_records(task, questions, records, answers))["metrics"]
        answers = {q.id: "text" for q in questions}
        records = complete_records(task, questions, task.score(questions, answers, None), answers)
        # No count of 0 successes that nobody has found.
        assert summarize(task, questions, records)["metrics"] == {f"judged/{name}": 0 for name in PROMPTS}

    def test_a_count_does_not_exceed_the_images(self, tmp_path):
        """A bootstrap sample may hold 30 of the 25 memes; an interval of their successes ends at 25 all the same."""
        task = load_task("advanced")
        questions = task.questions(write_advanced(tmp_path, images=5))
        answers = {q.id: "text" for q in questions}
        columns = [verdict_columns(None if n == 0 else n % 5 < 4) for n in range(20)]
        records = [a | b for a, b in zip(task.score(questions, answers, None), columns)]
        entry = summarize(task, questions, complete_records(task, questions, records, answers))
        assert [entry["metrics"][f"successes/{name}"] for name in PROMPTS] == [3, 4, 4, 4]
        assert [entry["metrics"][f"judged/{name}"] for name in PROMPTS] == [4, 5, 5, 5]
        assert entry["intervals"]["judged/poem"] == [5, 5] and entry["intervals"]["successes/poem"][1] == 5

    def test_a_judge_needs_descriptions(self, tmp_path):
        questions = load_task("advanced").questions(write_advanced(tmp_path, described=False))
        with pytest.raises(ValueError, match=r"meme/00.png' has no description for the judge"):
            scored("advanced", questions, {q.id: "text" for q in questions}, lambda text: "yes")

    def test_bad_folders(self, tmp_path):
        task = load_task("advanced")
        with pytest.raises(ValueError, match=r"no folder .*meme"):
            task.questions(tmp_path)
        (tmp_path / "meme").mkdir()
        with pytest.raises(ValueError, match=r"holds no image"):
            task.questions(tmp_path)
        write_advanced(tmp_path)
        for rows, message in (
            ([{"image": "99.png", "description": "x"}], "about '99.png', which is not in the folder"),
            ([{"image": "00.png", "description": "x"}] * 2, "repeats"),
            ([{"image": "00.png"}], "not of the form"),
        ):
            write_lines(tmp_path / "poem" / "descriptions.jsonl", rows)
            with pytest.raises(ValueError, match=message):
                task.questions(tmp_path)


class TestCocoCoverage:
    def test_scores(self, tmp_path):
        """Three images with 2 captions each; of the third, the judge cannot be read about one."""
        captions = {7: ["a cat", "a mat"], 3: ["a dog", "a fog"], 12: ["a hen", "a pen"], 20: ["x", "y"]}
        questions = load_task("coco_coverage").questions(write_coco(tmp_path, captions))
        assert [q.id for q in questions] == ["3", "7", "12", "20"]
        assert questions[1].images[0].endswith("val2014/COCO_val2014_000000000007.jpg")
        answers = {"3": "dog and fog", "7": "a cat alone", "12": "a hen"}

        def respond(text):
            if "'a pen'" in text or "cannot be used" in text:
                return "perhaps"
            return "yes" if any(f"'{caption}'" in text for caption in ("a dog", "a fog", "a cat", "a hen")) else "No"

        records, metrics, asked = scored("coco_coverage", questions, answers, respond)
        assert [record["captions_covered"] for record in records] == [2, 1, None, 0]
        assert metrics["captions_covered"] == pytest.approx(1.0)
        drawn = [question.reference["drawn"] for question in questions]
        expected = [1, 1 - drawn[1], None if drawn[2] else 1, 0]
        assert [record["covered"] for record in records] == expected
        assert metrics["unreadable"] == pytest.approx(100 * 0.5 / 3)
        assert (
            "There is one image caption1 'a mat', and there is another image caption2 'a cat alone'. Does image "
            "caption2 cover all the objects and visual relations shown in image caption1? Only answer yes or no "
            "without any explanation."
        ) in asked
        assert len(asked) == 7 and records[3]["failed"]

    def test_the_drawn_caption_is_the_same_each_time(self, tmp_path):
        data = write_coco(tmp_path, {key: list("abcde") for key in range(40)})
        first, second = (load_task("coco_coverage").questions(data) for _ in range(2))
        assert first == second
        assert {question.reference["drawn"] for question in first} == {0, 1, 2, 3, 4}

    def test_needs_a_judge(self):
        with pytest.raises(ValueError, match=r"none is given"):
            load_task("coco_coverage").score([], {}, None)

    def test_more_images_than_wanted_are_drawn(self, tmp_path):
        data = write_coco(tmp_path, {key: ["a"] for key in range(30)})
        keys = [key for key, _, _ in captioned_images(data, 10)]
        assert len(set(keys)) == 10 and keys == sorted(keys) and keys != list(range(10))
        assert keys == [key for key, _, _ in captioned_images(data, 10)]

    def test_val_beside_train_as_in_the_official_archive(self, tmp_path):
        write_coco(tmp_path, {1: ["a"]})
        folder = tmp_path / "annotations"
        (folder / "captions_train2014.json").write_text(json.dumps({"images": [], "annotations": []}))
        assert [key for key, _, _ in captioned_images(tmp_path, 10)] == [1]
        (folder / "captions_val2014.json").rename(folder / "captions_train2014.json")
        assert [key for key, _, _ in captioned_images(tmp_path, 10)] == [1]

    def test_annotations_of_another_split(self, tmp_path):
        write_coco(tmp_path / "val", {1: ["a"], 2: ["b"]})
        (tmp_path / "val" / "val2014").rename(tmp_path / "val" / "other")
        with pytest.raises(ValueError, match=r"none of the 2 images .*annotations and images are of the same split"):
            load_task("coco_coverage").questions(tmp_path / "val")

    def test_bad_files(self, tmp_path):
        task = load_task("coco_coverage")
        with pytest.raises(ValueError, match=r"holds none of captions_val\*.json"):
            task.questions(tmp_path)
        path = tmp_path / "captions_val2014.json"
        images = [{"id": 1, "file_name": "a.jpg"}]
        for content, message in (
            ([], "not a COCO captions file"),
            ({"images": images * 2, "annotations": []}, "image id 1 twice"),
            ({"images": images, "annotations": [{"image_id": 1, "bbox": []}]}, "not the instances"),
            (
                {"images": images, "annotations": [{"image_id": 2, "caption": "a"}]},
                "not a caption of one",
            ),
            ({"images": [{"id": 1}], "annotations": []}, "not a COCO captions file"),
        ):
            path.write_text(json.dumps(content))
            with pytest.raises(ValueError, match=message):
                task.questions(tmp_path)


GOOD = "A brown dog lies on a red sofa beside a window. The room is bright and a lamp stands in the corner."


class TestStage2Failures:
    def question(self, key="1", prompt="detail"):
        captions = {"captions": ["a dog on a sofa", "a sofa with a dog"]}
        prompts = load_task("stage2_failures").prompts
        return Question(f"{key}/{prompt}", prompts[prompt], (), captions, {"prompt": prompt})

    @pytest.mark.parametrize(
        "text,kind",
        [
            (GOOD, None),
            (GOOD + " The room is bright and a lamp stands in the corner.", "repetition"),
            ("A dog lies on a sofa and and and and on a sofa in the room of the house.", "repetition"),
            ("a dog", "fragment"),
            (
                "A brown dog lies on a red sofa beside a window. The room is bright and a lamp stands in the",
                "fragment",
            ),
            ("", "fragment"),
        ],
    )
    def test_rules(self, text, kind):
        question = self.question()
        (record,) = load_task("stage2_failures").score([question], {question.id: text}, None)
        assert record["kind"] == kind
        assert record["failure"] == (kind is not None)

    def test_a_poem_may_have_a_refrain(self):
        verse = "The dog lies dreaming on the couch so red,\nwith {} above its head.\nO gentle sleeper, dream.\n\n"
        poem = "".join(verse.format(what) for what in ("golden light", "silver stars", "the quiet moon"))
        poem = poem.replace(
            "The dog lies dreaming on the couch so red,\nwith silver", "A heart so loyal rests in peace,\nwith silver"
        )
        poem = poem.replace(
            "The dog lies dreaming on the couch so red,\nwith the", "Now evening falls and all is still,\nwith the"
        )
        for prompt, kind in (("poem", None), ("detail", "repetition")):
            question = self.question(prompt=prompt)
            (record,) = load_task("stage2_failures").score([question], {question.id: poem}, None)
            assert record["kind"] == kind, record

    def test_scores(self):
        """Five descriptions: good, off-topic, repetition, judge unreadable, no answer; and one good poem."""
        questions = [self.question(key) for key in "12345"] + [self.question("1", "poem")]
        answers = {
            "1/detail": GOOD,
            "2/detail": "Welcome to our store. We sell the best shoes of the whole city at good prices.",
            "3/detail": GOOD + " " + GOOD,
            "4/detail": GOOD + " Nobody knows why.",
            "1/poem": GOOD,
        }

        def respond(text):
            if "Nobody knows" in text or "cannot be used" in text:
                return "It depends."
            return "no" if "shoes" in text else "yes"

        records, metrics, asked = scored("stage2_failures", questions, answers, respond)
        kinds = [record["kind"] for record in records]
        assert kinds == [None, "off-topic", "repetition", None, "no answer", None]
        assert [record["failure"] for record in records] == [0, 1, 1, None, 1, 0]
        assert metrics["failure/detail"] == pytest.approx(75.0) and metrics["failure/poem"] == 0
        assert metrics["repetition/detail"] == pytest.approx(20.0)
        assert metrics["off_topic/detail"] == pytest.approx(25.0)
        assert metrics["unreadable"] == pytest.approx(25.0)
        # What fails by rule is not paid for.
        assert len(asked) == 5 and all(
            "- a dog on a sofa\n- a sofa with a dog" in text for text in asked if "People" in text
        )

    def test_questions(self, tmp_path):
        data = write_coco(tmp_path, {key: ["a"] for key in range(120)})
        questions = load_task("stage2_failures").questions(data)
        assert len(questions) == 200
        assert [q.groups["prompt"] for q in questions[:2]] == ["detail", "poem"]
        assert questions[0].images == questions[1].images


class TestLLaVABench:
    def write(self, folder, kinds=("conv", "detail", "complex")):
        rows = [
            {"question_id": i, "image": f"{i:012d}.jpg", "category": kind, "text": f"Question {i}?"}
            for i, kind in enumerate(kinds)
        ]
        write_lines(folder / "qa90_questions.jsonl", rows)
        references = [{"question_id": i, "answer_id": f"x{i}", "text": f"Reference {i}."} for i in range(len(kinds))]
        write_lines(folder / "qa90_gpt4_answer.jsonl", references)
        contexts = [
            {
                "id": str(i),
                "image": row["image"],
                "captions": ["A cat.", "A cat on a mat."],
                "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}],
            }
            for i, row in enumerate(rows)
        ]
        write_lines(folder / "caps_boxes_coco2014_val_80.jsonl", contexts)
        write_image(folder / "images" / "COCO_val2014_000000000001.jpg")
        write_image(folder / "images" / "000000000002.jpg")
        return folder

    def test_questions(self, tmp_path):
        questions = load_task("llava_bench").questions(self.write(tmp_path))
        assert [(q.id, q.prompt, q.groups["kind"]) for q in questions] == [
            ("0", "Question 0?", "conv"),
            ("1", "Question 1?", "detail"),
            ("2", "Question 2?", "complex"),
        ]
        assert [q.images[0].rpartition("/")[2] for q in questions] == [
            "000000000000.jpg",
            "COCO_val2014_000000000001.jpg",
            "000000000002.jpg",
        ]
        context = "A cat.\nA cat on a mat.\n\ncat: [0.1, 0.2, 0.3, 0.4]"
        facts = {"answer": "Reference 0.", "context": context, "kind_of_context": "coco"}
        assert questions[0].reference == facts

    def test_the_in_the_wild_files(self, tmp_path):
        write_lines(
            tmp_path / "questions.jsonl", [{"question_id": 0, "image": "001.jpg", "category": "conv", "text": "Who?"}]
        )
        write_lines(
            tmp_path / "answers_gpt4.jsonl", [{"question_id": 0, "answer_id": "x", "text": "He.", "model_id": "gpt-4"}]
        )
        write_lines(tmp_path / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A painting."}])
        (question,) = load_task("llava_bench").questions(tmp_path)
        facts = {"answer": "He.", "context": "A painting.", "kind_of_context": "in_the_wild"}
        assert question.reference == facts

    def test_scores(self, tmp_path):
        """The judge gives the first place one point more; both orders cancel that."""
        questions = load_task("llava_bench").questions(self.write(tmp_path, ("conv", "conv", "detail", "complex")))
        answers = {"0": "Equal.", "1": "Poor.", "2": "Prose."}
        worth = {"Equal.": 8, "Poor.": 4}

        def respond(text):
            if "Prose." in text or "cannot be used" in text:
                return "Both have merits."
            answer = next(word for word in worth if word in text)
            score = worth[answer]
            first = text.index(answer) < text.index("Reference ")
            return f"{score + 1} 8" if first else f"9 {score}"

        records, metrics, asked = scored("llava_bench", questions, answers, respond)
        assert [(r["score"], r["reference_score"]) for r in records] == [(8.5, 8.5), (4.5, 8.5), (None, None), (1, 10)]
        assert metrics["relative_score"] == pytest.approx(100 * 14 / 27)
        assert metrics["relative_score/conv"] == pytest.approx(100 * 13 / 17)
        assert metrics["relative_score/complex"] == pytest.approx(10)
        assert "relative_score/detail" not in metrics
        assert metrics["unreadable"] == pytest.approx(100 / 3)
        assert all("cat: [0.1, 0.2, 0.3, 0.4]" in text for text in asked if "cannot be used" not in text)
        assert sum("Question 0?" in text for text in asked) == 2

    def test_bad_files(self, tmp_path):
        task = load_task("llava_bench")
        self.write(tmp_path)
        (tmp_path / "qa90_gpt4_answer.jsonl").write_text('{"question_id": 0, "text": "a"}\n')
        with pytest.raises(ValueError, match=r"question 1 of .* has no reference answer"):
            task.questions(tmp_path)
        self.write(tmp_path, ("conv", "chat"))
        with pytest.raises(ValueError, match=r"of kind 'chat', not conv, detail, complex"):
            task.questions(tmp_path)
        rows = [{"question_id": 0, "image": "a.jpg", "category": "conv", "text": "?"}]
        write_lines(tmp_path / "qa90_questions.jsonl", rows * 2)
        with pytest.raises(ValueError, match=r"line 2 of .*repeats the question_id 0"):
            task.questions(tmp_path)
        write_lines(tmp_path / "qa90_questions.jsonl", [{"question_id": 0, "prompt": "?"}])
        with pytest.raises(ValueError, match=r"has no 'text', 'image', 'category'"):
            task.questions(tmp_path)
