"""What a streamer gets of an answer: its ids, without the sequence or token that ends it."""

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from transformers_minigpt4.modeling.stop_sequences_minigpt4 import WithoutStopSequences


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts: list[list[int]] = []
        self.ended = False

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


def streamed(stops, ids, several=1):
    recorder = Recorder()
    streamer = WithoutStopSequences(recorder, stops)
    streamer.put(torch.tensor([[90, 91]]))
    for start in range(0, len(ids), several):
        streamer.put(torch.tensor(ids[start : start + several]))
    early = [puts[0] for puts in recorder.puts[1:]]
    streamer.end()
    assert recorder.ended and recorder.puts[0] == [[90, 91]]
    return early, [puts[0] for puts in recorder.puts[1:]]


@pytest.mark.parametrize("several", [1, 3])
@pytest.mark.parametrize(
    ("ids", "early", "all_"),
    [
        ([5, 6, 7, 8], [5, 6], [5, 6]),
        ([5, 7, 7, 8], [5, 7], [5, 7]),
        ([5, 7, 6], [5, 7, 6], [5, 7, 6]),
        ([5, 7], [5], [5, 7]),  # the longest answer ends within what may be a stop sequence
        ([5, 1, 2, 1, 2, 3], [5, 1, 2], [5, 1, 2]),
        ([9], [], []),
        ([5, 9, 6, 6], [5], [5]),  # several ids at once may run past the end
    ],
)
def test_ids_before_the_end(ids, early, all_, several):
    assert streamed([[7, 8], [1, 2, 3], [9]], ids, several) == (early, all_)


def test_several_answers_are_handed_on_as_they_are():
    recorder = Recorder()
    streamer = WithoutStopSequences(recorder, [[7, 8]])
    for value in (torch.tensor([[1], [2]]), torch.tensor([7, 8])):
        streamer.put(value)
    assert recorder.puts == [[[1], [2]], [7, 8]]


@pytest.mark.parametrize("way", ["config", "argument", "end token", "assistant"])
def test_generate(model, processor, pictures, way):
    inputs = processor(images=pictures[:1], text="<Img><ImageHere></Img> What?", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "stop_sequences": []}
    free = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    stop = free[4:6]
    before = free[:4] if way != "end token" else free[: free.index(stop[1])]
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1, "stop_sequences": [stop]}
    if way == "end token":
        options = {**options, "stop_sequences": [], "eos_token_id": [stop[1]]}
    if way == "assistant":
        options["prompt_lookup_num_tokens"] = 3
    if way == "config":
        config = processor.get_generation_config(**options)
        options = {"generation_config": config}
    recorder = Recorder()
    model.generate(**inputs, **options, streamer=recorder)
    assert recorder.puts[0] == inputs["input_ids"].tolist() and recorder.ended
    assert [id_ for puts in recorder.puts[1:] for id_ in puts] == before
