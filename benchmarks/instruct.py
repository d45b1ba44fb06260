"""Measures how many answers `minigpt4 instruct generate` gets from an endpoint, against one request at a time.

    python benchmarks/instruct.py
    python benchmarks/instruct.py --requests 40 --alone 10 --repeats 1 --coco 1000   # seconds

A server in its own process answers every request after 50 ms, over real HTTP. Measured is the complete step: choosing
the rows, asking, the cache of answers, results and usage in the project's file. One at a time is the same with a
concurrency of 1, for fewer requests. `--coco` reads files like COCO's, with that many images, and gives the peak
memory of a process before and after.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

from transformers_minigpt4.instruct.config import InstructConfig
from transformers_minigpt4.instruct.generate import run_generate
from transformers_minigpt4.instruct.scenes import read_scenes
from transformers_minigpt4.instruct.store import InstructProject
from transformers_minigpt4.llm.types import ChatSettings


DELAY = 0.05  # seconds that the endpoint takes for an answer
LIMIT = 10.0  # seconds for 1,000 requests
ANSWER = "Question:\nWhat is it?\n===\nAnswer:\nIt is a bench in a garden, and two people sit on it in the shade."
_CAPTIONS, _BOXES, _POINTS = 5, 7, 60  # of an image, about as in COCO; numbers of a box's outline


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(DELAY)
        message = {"role": "assistant", "content": ANSWER}
        usage = {"prompt_tokens": 1000, "completion_tokens": 30}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        payload = json.dumps({"object": "chat.completion", "choices": choices, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def serve(sender: Connection) -> None:
    """The endpoint; sends its port."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        sender.send(server.server_address[1])
        server.serve_forever()


def seconds(port: int, requests: int, concurrency: int, scratch: Path) -> float:
    """Wall-clock seconds of the step."""
    scratch.mkdir()
    rows = ({"image": f"{number}.jpg", "captions": [f"Scene {number}."]} for number in range(requests))
    (scratch / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = ChatSettings("m", f"http://127.0.0.1:{port}/v1", concurrency=concurrency)
    config = InstructConfig(str(scratch / "own.jsonl"), chat=chat, kinds={"conversation": 1})
    with InstructProject.create(scratch, config) as project:
        start = time.perf_counter()
        done = run_generate(project, config, progress=False)
        taken = time.perf_counter() - start
    if done.answered != requests or done.usage.requests != requests:
        raise SystemExit(f"{done.answered} of {requests} rows were answered, with {done.usage.requests} requests")
    return taken


def write_coco(folder: Path, images: int) -> tuple[Path, Path]:
    """Files of captions and instances like COCO's, with this many images."""
    paths = folder / "captions.json", folder / "instances.json"

    def listed(key: str, entries: Iterator[dict[str, object]]) -> Iterator[str]:
        yield f'"{key}": ['
        for number, entry in enumerate(entries):
            yield ("" if number == 0 else ", ") + json.dumps(entry)
        yield "]"

    shown = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 640, "height": 480} for n in range(images)]
    captions = (
        {"id": n, "image_id": n // _CAPTIONS, "caption": f"A man rides a brown horse along beach number {n}."}
        for n in range(_CAPTIONS * images)
    )
    boxes: Iterator[dict[str, object]] = (
        {
            "id": n,
            "image_id": n // _BOXES,
            "category_id": n % 80,
            "bbox": [n % 300, 20.5, 100.25, 200.75],
            "segmentation": [[number + 0.25 for number in range(_POINTS)]],
        }
        for n in range(_BOXES * images)
    )
    categories = ({"id": n, "name": f"thing {n}"} for n in range(80))
    for path, parts in zip(
        paths,
        (
            (listed("images", iter(shown)), listed("annotations", captions)),
            (listed("annotations", boxes), listed("categories", categories)),
        ),
    ):
        with open(path, "w", encoding="utf-8") as file:
            file.write("{")
            file.writelines(parts[0])
            file.write(", ")
            file.writelines(parts[1])
            file.write("}")
    return paths


def read(paths: tuple[Path, Path], sender: Connection) -> None:
    """Sends images, seconds, and the peak memory of this process in MB before and after."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    images = sum(1 for _ in read_scenes(*paths))
    taken = time.perf_counter() - start
    sender.send((images, taken, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=100, help="requests one at a time")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--coco", type=int, default=118_287, help="images of the files to read; 0 for none")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(False)
    with tempfile.TemporaryDirectory() as scratch:
        server = context.Process(target=serve, args=(sender,), daemon=True)
        server.start()
        port, folder = receiver.recv(), Path(scratch)
        seconds(port, 4, 2, folder / "warm")
        rates: dict[int, list[float]] = {concurrency: [] for concurrency in (1, *arguments.concurrency)}
        for repeat in range(arguments.repeats):
            for concurrency, found in rates.items():
                requests = arguments.alone if concurrency == 1 else arguments.requests
                found.append(requests / seconds(port, requests, concurrency, folder / f"{repeat}-{concurrency}"))
        server.terminate()
        alone = statistics.median(rates[1])
        print("| in flight | answers per second | against one at a time | 1,000 answers |")
        print("| ---: | ---: | ---: | ---: |")
        for concurrency, found in rates.items():
            rate = statistics.median(found)
            print(f"| {concurrency} | {rate:.1f} | {rate / alone:.1f} | {1000 / rate:.1f} s |")
        if arguments.coco:
            paths = write_coco(folder, arguments.coco)
            size = sum(path.stat().st_size for path in paths) / 1e6
            reader = context.Process(target=read, args=(paths, sender))
            reader.start()
            images, taken, before, after = receiver.recv()
            print(
                f"\n{images:,} images in {size:,.0f} MB: {taken:.1f} s, memory {before:,.0f} MB, then {after:,.0f} MB"
            )
    fastest = max(statistics.median(found) for found in rates.values())
    print(f"aim, 1,000 answers in under {LIMIT:g} s: {'met' if 1000 / fastest < LIMIT else 'not met'}")


if __name__ == "__main__":
    main()
