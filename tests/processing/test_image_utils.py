"""Checks that pictures of every kind load as upright RGB, and that bad ones give one clear error."""

import base64
import io
import os
import pickle
import re
import struct
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageChops

from transformers_minigpt4.processing import image_utils_minigpt4
from transformers_minigpt4.processing.image_utils_minigpt4 import (
    MAX_DOWNLOAD_BYTES,
    ImageLoadError,
    _http_client,
    load_image,
    open_image,
    to_rgb,
)


def photo(width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Noise, so that compressed files are long enough to be cut."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def error_of(source, **options) -> str:
    """The message of the error that loading `source` gives, checked for being one line."""
    with pytest.raises(ImageLoadError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert re.fullmatch(r"cannot load image .+: .+; .+", message)
    return message


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Run the test without the superuser's right to read every file."""
    if not hasattr(os, "seteuid"):
        pytest.skip("needs POSIX users")
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


class TestToRgb:
    def test_upright_rgb_comes_back_as_is(self):
        image = photo()
        assert to_rgb(image) is image

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
    def test_8_bit_modes_are_converted_by_pil(self, mode):
        image = photo().convert("L").convert(mode) if mode in ("LA", "PA", "LAB") else photo(mode=mode)
        result = to_rgb(image)
        assert result.mode == "RGB"
        assert ImageChops.difference(result, image.convert("RGB")).getbbox() is None

    def test_alpha_is_dropped_not_blended(self):
        image = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
        assert to_rgb(image).getpixel((0, 0)) == (200, 100, 50)

    @pytest.mark.parametrize("dtype, mode", [("<u2", "I;16"), (">u2", "I;16B")])
    def test_16_bit_is_scaled(self, dtype, mode):
        image = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=dtype))
        assert image.mode == mode
        assert np.asarray(to_rgb(image))[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]

    @pytest.mark.parametrize(
        "values, dtype, expected",
        [
            ([0, 100, 255], np.int32, [0, 100, 255]),
            ([0, 257 * 100, 65535], np.int32, [0, 100, 255]),
            ([-51, 0, 204], np.int32, [0, 51, 255]),
            ([0.0, 0.2, 1.0], np.float32, [0, 51, 255]),
            ([0.0, 51.0, 255.0], np.float32, [0, 51, 255]),
            ([0.0, 257.0 * 51, 65535.0], np.float32, [0, 51, 255]),
            ([-1.0, 0.6, 1.0], np.float32, [0, 204, 255]),
            ([np.nan, np.inf, 0.2], np.float32, [0, 255, 51]),
            ([-5.0, -5.0, -5.0], np.float32, [0, 0, 0]),
            ([np.nan, np.nan, np.nan], np.float32, [0, 0, 0]),
        ],
    )
    def test_32_bit_range_is_read_off_the_values(self, values, dtype, expected):
        image = Image.fromarray(np.array([values], dtype=dtype))
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == expected

    def test_mode_without_a_way_to_rgb(self):
        with pytest.raises(ImageLoadError, match="mode 'La' has no conversion to RGB"):
            to_rgb(Image.new("La", (2, 2)))

    def test_current_frame_of_an_animation_is_taken(self):
        frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
        animation = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
        animation.seek(1)
        assert to_rgb(animation).getpixel((0, 0)) == (0, 0, 255)


class TestGoodPictures:
    @pytest.mark.parametrize("size", [(1, 1), (1, 500), (60, 40)])
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_kinds_and_sizes(self, tmp_path, kind, size):
        path = tmp_path / "an image"
        path.write_bytes(encoded(photo(*size), kind))
        image = load_image(path)
        assert (image.mode, image.size) == ("RGB", size)

    @pytest.mark.parametrize(
        "wrap", [str, Path, Path.read_bytes, lambda path: bytearray(path.read_bytes()), Image.open]
    )
    def test_source_types_agree(self, tmp_path, wrap: Callable):
        photo().save(tmp_path / "a.png")
        assert load_image(wrap(tmp_path / "a.png")).tobytes() == photo().tobytes()

    def test_open_file_stays_open(self, tmp_path):
        photo().save(tmp_path / "a.png")
        with open(tmp_path / "a.png", "rb") as file:
            assert load_image(file).tobytes() == photo().tobytes()
            assert not file.closed

    def test_pipe(self):
        read_end, write_end = os.pipe()
        with os.fdopen(write_end, "wb") as sink:
            sink.write(encoded(photo(), "PNG"))
        with os.fdopen(read_end, "rb") as pipe:
            assert load_image(pipe).tobytes() == photo().tobytes()

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_named_pipe(self, tmp_path):
        """It would wait for a writer, for ever if there is none."""
        os.mkfifo(tmp_path / "pipe.jpg")
        assert "it is a pipe, a socket or a device" in error_of(tmp_path / "pipe.jpg")
        with pytest.raises(OSError, match="not a regular file"):
            open_image(tmp_path / "pipe.jpg")
        assert "a device" in error_of("/dev/zero")

    @pytest.mark.parametrize("name", ["photo.jpg", "drawing.eps"])
    def test_postscript_starts_no_program(self, tmp_path, monkeypatch, name):
        """PIL would hand it to Ghostscript, whatever it is called."""
        started = []
        monkeypatch.setattr(subprocess, "Popen", lambda *a, **_: started.append(a) or pytest.fail("a program started"))
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **_: started.append(a) or photo())
        photo().save(tmp_path / "a.eps", "EPS")
        (tmp_path / name).write_bytes((tmp_path / "a.eps").read_bytes())
        assert "not an image in one of the formats JPEG, PNG" in error_of(tmp_path / name)
        assert "not an image" in error_of((tmp_path / name).read_bytes())
        assert not started

    def test_unprintable_name(self, tmp_path):
        message = error_of(tmp_path / "a\u2028\n\udc80.png")
        assert r"/a\u2028\n\udc80.png': there is no such file" in message

    def test_every_image_is_opened_with_the_list_of_formats(self):
        """`Image.open` without `formats` reads whatever a plugin recognizes."""
        package = Path(image_utils_minigpt4.__file__).parents[1]
        lines = [line.strip() for path in package.rglob("*.py") for line in path.read_text().splitlines()]
        calls = [line for line in lines if "Image.open(" in line and not line.startswith(("...", ">>>"))]
        assert len(calls) == 1 and "formats=" in calls[0]

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
    def test_no_file_is_left_open(self, tmp_path):
        photo().save(tmp_path / "a.png")
        images = [load_image(tmp_path / "a.png") for _ in range(3)]
        targets = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        assert len(images) == 3 and not any(target.endswith("a.png") for target in targets)

    def test_16_bit_png(self, tmp_path):
        Image.fromarray(np.array([[0, 25700, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
        assert np.asarray(load_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 100, 255]

    def test_cmyk_jpeg(self, tmp_path):
        Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK").save(tmp_path / "a.jpg")
        red, green, blue = load_image(tmp_path / "a.jpg").getpixel((8, 8))
        assert red > 220 and green < 40 and blue < 40

    def test_palette_with_transparency(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "a.png", transparency=1)
        loaded = load_image(tmp_path / "a.png")
        assert [loaded.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (200, 100, 50)]

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_first_frame_of_an_animation(self, kind):
        frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert load_image(content).getpixel((8, 8)) == (255, 0, 0)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
    @pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (59, 39)), (6, (39, 0)), (8, (0, 59))])
    def test_exif_orientation(self, kind, orientation, corner):
        image = Image.new("RGB", (60, 40), "black")
        image.paste("white", (0, 0, 16, 16))
        exif = Image.Exif()
        exif[0x0112] = orientation
        loaded = load_image(encoded(image, kind, exif=exif))
        assert loaded.size == ((60, 40) if orientation in (1, 3) else (40, 60))
        assert min(loaded.getpixel(corner)) > 200
        assert sum(min(loaded.getpixel((x, y))) > 200 for x in (0, -1) for y in (0, -1)) == 1

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
    def test_broken_exif_does_not_spoil_the_image(self, exif):
        assert load_image(encoded(photo(), "JPEG", exif=exif)).size == (60, 40)

    def test_base64(self):
        text = base64.b64encode(encoded(photo(), "PNG")).decode()
        for source in (text, f"data:image/png;base64,{text}", "\n".join(re.findall(".{1,76}", text))):
            assert load_image(source).tobytes() == photo().tobytes()

    def test_path_that_could_be_base64(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        photo().save("a" * 40, "PNG")
        assert load_image("a" * 40).size == (60, 40)


class TestBadPictures:
    def test_no_image(self, tmp_path):
        (tmp_path / "notes.jpg").write_text("a shopping list")
        message = error_of(tmp_path / "notes.jpg")
        assert "notes.jpg" in message and "not an image" in message and "BytesIO" not in message

    @pytest.mark.parametrize("empty", [b"", io.BytesIO(b"")])
    def test_empty(self, empty):
        assert "it is empty" in error_of(empty)

    def test_empty_file(self, tmp_path):
        (tmp_path / "a.jpg").touch()
        assert "it is empty" in error_of(tmp_path / "a.jpg")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
    def test_truncated(self, kind, share):
        content = encoded(photo(200, 200), kind)
        assert "broken or cut short" in error_of(content[: int(len(content) * share)])

    @pytest.mark.parametrize("missing", [1, 2, 100])
    def test_truncated_progressive_jpeg(self, missing):
        assert "cut short" in error_of(encoded(photo(200, 200), "JPEG", progressive=True)[:-missing])

    def test_truncated_pil_image(self, tmp_path):
        (tmp_path / "a.jpg").write_bytes(encoded(photo(200, 200), "JPEG")[:-500])
        with Image.open(tmp_path / "a.jpg") as image:
            assert "a.jpg" in error_of(image)

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
    def test_flipped_bytes_give_an_image_or_this_error(self, kind):
        content = encoded(photo(), kind)
        random = np.random.default_rng(0)
        failures = 0
        for _ in range(40):
            broken = np.frombuffer(content, np.uint8).copy()
            broken[random.integers(0, len(broken), 20)] = random.integers(0, 256, 20)
            try:
                assert load_image(broken.tobytes()).mode == "RGB"
            except ImageLoadError:
                failures += 1
        assert failures > 0

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [9_600, 60_000])
    def test_decompression_bomb(self, side):
        """Over PIL's warning level (9600 x 9600) and over its error level, from a file of under 200 bytes."""
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
        body = b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        started = time.monotonic()
        assert "decompression bomb" in error_of(b"\x89PNG\r\n\x1a\n" + body)
        assert time.monotonic() - started < 5

    def test_missing(self, tmp_path):
        assert "there is no such file; check the path" in error_of(tmp_path / "a.jpg")
        assert "there is no such file" in error_of("images/train/without-suffix/000000012345")
        assert "there is no such file" in error_of("a" * 40)

    @pytest.mark.parametrize("path", ["a" * 5000 + ".jpg", "nul\0byte.jpg", ""])
    def test_impossible_paths(self, path):
        assert len(error_of(path)) < 400

    def test_directory(self, tmp_path):
        assert "it is a directory" in error_of(tmp_path)

    def test_folder_that_is_a_file(self, tmp_path):
        photo().save(tmp_path / "a.png")
        assert "cannot be read" in error_of(tmp_path / "a.png" / "b.png")

    def test_unreadable(self, ordinary_user):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.png")
            photo().save(path)
            path.chmod(0)
            assert "permission denied" in error_of(path)

    @pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
    def test_read_error(self):
        assert "Input/output error" in error_of("/proc/self/mem")

    @pytest.mark.parametrize("source", [None, 3, ["a.jpg"], np.zeros((4, 4, 3))])
    def test_wrong_type(self, source):
        assert f"{type(source).__name__} is not an image source" in error_of(source)

    def test_text_file_handle(self, tmp_path):
        (tmp_path / "a.txt").write_text("x")
        with open(tmp_path / "a.txt") as file:
            assert "binary mode" in error_of(file)

    def test_closed_file_handle(self, tmp_path):
        photo().save(tmp_path / "a.png")
        with open(tmp_path / "a.png", "rb") as file:
            pass
        assert "closed file" in error_of(file)

    @pytest.mark.parametrize("url", ["data:image/png;base64", "data:image/png;base64,a", "data:,hello", "data:,"])
    def test_bad_data_url(self, url):
        error_of(url)

    @pytest.mark.parametrize("scheme", ["ftp", "file", "s3"])
    def test_unsupported_scheme(self, scheme):
        assert f"{scheme}:// is not supported" in error_of(f"{scheme}://host/a.png")

    def test_error_survives_pickling(self, tmp_path):
        with pytest.raises(ImageLoadError) as caught:
            load_image(tmp_path)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


class Pictures(BaseHTTPRequestHandler):
    """Serves one behavior a path."""

    def do_GET(self):
        if self.path.startswith("/ok"):
            self.answer(encoded(photo(), "PNG"), "image/png")
        elif self.path.startswith("/page"):
            self.answer(b"<html>log in</html>", "text/html")
        elif self.path.startswith("/short"):
            self.answer(encoded(photo(), "PNG"), "image/png", length=10**5)
        elif self.path.startswith("/announced"):
            self.answer(b"", "image/png", length=10**12)
        elif self.path.startswith("/endless"):
            self.stream(bytes(2**20), pause=0, times=2 * MAX_DOWNLOAD_BYTES // 2**20)
        elif self.path.startswith("/hang"):
            self.server.released.wait(20)
        elif self.path.startswith("/drip"):
            self.stream(b"x", pause=0.1, times=200)
        elif self.path.startswith("/headers"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not self.server.released.wait(0.05):
                self.wfile.write(b"x")
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        else:
            self.send_error(404)

    def answer(self, content: bytes, kind: str, length: int | None = None):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def stream(self, content: bytes, pause: float, times: int):
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(times):
                self.wfile.write(content)
                if self.server.released.wait(pause):
                    break
        except OSError:
            self.server.hung_up.set()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.released, server.hung_up = threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server) -> str:
    server.hung_up.clear()
    return f"http://127.0.0.1:{server.server_port}"


class TestUrls:
    def test_ok(self, url):
        assert load_image(f"{url}/ok.png").tobytes() == photo().tobytes()

    def test_scheme_in_capitals(self, url):
        assert load_image(url.replace("http", "HTTP") + "/ok.png").size == (60, 40)

    def test_forked_process_opens_its_own_connections(self, url):
        load_image(f"{url}/ok.png")
        client = _http_client(os.getpid())
        assert _http_client(os.getpid()) is client
        assert _http_client(-1) is not client

    def test_redirect(self, url):
        assert load_image(f"{url}/to/{url}/ok.png").size == (60, 40)

    def test_many_at_once(self, url):
        with ThreadPoolExecutor(8) as pool:
            sizes = {image.size for image in pool.map(load_image, [f"{url}/ok{number}" for number in range(32)])}
        assert sizes == {(60, 40)}

    def test_not_found(self, url):
        assert "the server answered 404 Not Found" in error_of(f"{url}/missing.png")

    def test_page_instead_of_image(self, url):
        assert "served as text/html" in error_of(f"{url}/page.png")

    def test_connection_that_breaks_off(self, url):
        assert "the download failed" in error_of(f"{url}/short.png")

    @pytest.mark.parametrize("path", ["hang", "drip", "headers"])
    def test_time_out(self, url, path):
        started = time.monotonic()
        assert "longer than 0.5 seconds" in error_of(f"{url}/{path}.png", timeout=0.5)
        assert time.monotonic() - started < 3

    @pytest.mark.parametrize("path", ["announced", "endless"])
    def test_too_large(self, url, path):
        assert "larger than 100 MiB" in error_of(f"{url}/{path}.png")

    def test_too_large_download_is_broken_off(self, url, server):
        error_of(f"{url}/endless.png")
        assert server.hung_up.wait(5)

    @pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/a.png"])
    def test_redirect_away_from_http(self, url, target):
        assert "not http or https" in error_of(f"{url}/to/{target}")

    def test_redirect_loop(self, url):
        assert "redirects" in error_of(f"{url}/to/{'/to/' * 10}{url}/ok.png")

    def test_nobody_listens(self):
        assert "the download failed" in error_of("http://127.0.0.1:9/a.png")

    @pytest.mark.parametrize("bad", ["http://", "http://[", "https://host name/a.png", "http://:80:80/"])
    def test_malformed(self, bad):
        error_of(bad)

    def test_password_stays_out_of_the_message(self, url):
        message = error_of(url.replace("//", "//user:secret@") + "/missing.png")
        assert "secret" not in message and "404" in message
