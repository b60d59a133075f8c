"""What loads, what is refused and how, and what the fingerprint depends on."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import AutoTokenizer, CLIPModel

from tests.videodistill.tiny import tiny_clip, tiny_siglip
from videodistill.encoders import ImageTextEncoder, load_encoder
from videodistill.errors import UserError

FRAMES = np.random.default_rng(1).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)


@pytest.fixture
def folder(clip_dir: Path, tmp_path: Path) -> Path:
    """A CLIP directory that the test may damage."""
    return Path(shutil.copytree(clip_dir, tmp_path / "mine"))


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refused(name: str | Path, named: str, **options: Any) -> str:
    """Assert that loading is refused in one line that matches `named`; returns the line."""
    with pytest.raises(UserError, match=named) as caught:
        load_encoder(name, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert Path(name).name in line
    return line


def test_loads_in_silence_without_network(
    clip_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    encoder = load_encoder(str(clip_dir))
    assert encoder.name == str(clip_dir)
    assert (encoder.image_size, encoder.grid, encoder.max_tokens) == (32, (4, 4), 24)
    assert encoder.logit_scale == pytest.approx(np.exp(2.6592), rel=1e-4)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_fingerprint_is_of_content(clip: ImageTextEncoder, folder: Path) -> None:
    assert len(clip.fingerprint) == 16
    int(clip.fingerprint, 16)
    assert load_encoder(folder).fingerprint == clip.fingerprint
    # Written out again by transformers, the same encoder.
    CLIPModel.from_pretrained(folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert load_encoder(folder).fingerprint == clip.fingerprint


def test_fingerprint_tells_encoders_apart(
    clip: ImageTextEncoder, siglip: ImageTextEncoder, folder: Path, tmp_path: Path
) -> None:
    seen = {clip.fingerprint, siglip.fingerprint}
    seen.add(load_encoder(tiny_clip(tmp_path / "other", seed=1)).fingerprint)
    settings = folder / "preprocessor_config.json"
    edit_json(settings, lambda content: content.update(image_mean=[0.5, 0.5, 0.5]))
    seen.add(load_encoder(folder).fingerprint)
    tokenizer = folder / "tokenizer.json"
    edit_json(tokenizer, lambda content: content.update(normalizer=None))
    seen.add(load_encoder(folder).fingerprint)
    config = folder / "config.json"
    edit_json(config, lambda content: content["text_config"].update(hidden_act="gelu"))
    seen.add(load_encoder(folder).fingerprint)
    assert len(seen) == 6


def test_shards_and_half_precision(clip: ImageTextEncoder, folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    whole = clip.encode_frames(FRAMES)
    torch.testing.assert_close(load_encoder(folder).encode_frames(FRAMES), whole)
    shutil.rmtree(folder)
    shutil.copytree(clip.name, folder)
    model.half().save_pretrained(folder)
    features = load_encoder(folder).encode_frames(FRAMES)
    assert features.frame_embed.dtype == torch.float32
    torch.testing.assert_close(features, whole, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", ["clip_dir", "siglip_dir"])
def test_products_in_bfloat16(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    exact, rounded = load_encoder(folder), load_encoder(folder, precision="bf16")
    assert (exact.precision, rounded.precision) == ("fp32", "bf16")
    assert exact.fingerprint == rounded.fingerprint
    for one, other in (
        (exact.encode_frames(FRAMES), rounded.encode_frames(FRAMES)),
        (exact.encode_texts(["a red ring"])[:2], rounded.encode_texts(["a red ring"])[:2]),
    ):
        for a, b in zip(one, other, strict=True):
            assert b.dtype == torch.float32
            assert 0 < (a - b).norm() < 0.02 * a.norm()
    layers = [x for x in rounded.modules() if isinstance(x, (nn.Linear, nn.LayerNorm))]
    for layer in layers:
        kept = torch.bfloat16 if isinstance(layer, nn.Linear) else torch.float32
        assert layer.weight.dtype == kept


def test_an_unknown_precision_is_refused(clip_dir: Path) -> None:
    with pytest.raises(UserError, match="precision 'fp8': use one of fp32, bf16"):
        load_encoder(clip_dir, precision="fp8")


def test_processor_config_and_its_absence(clip: ImageTextEncoder, folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    assert load_encoder(folder).transform == clip.transform
    nested = {"image_processor": settings | {"resample": 2}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert load_encoder(folder).transform.filter == "bilinear"


def test_end_token_by_the_old_convention(clip: ImageTextEncoder, folder: Path) -> None:
    """eos_token_id 2 means the highest id: right only where that is the end token."""
    config = folder / "config.json"
    edit_json(config, lambda content: content["text_config"].update(eos_token_id=2))
    refused(folder, "eos_token_id 2")
    # Exchange the end token (1) and the highest id, and their embeddings: the same encoder.
    highest = len(clip.tokenizer) - 1
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = next(token for token, index in vocabulary.items() if index == highest)
    vocabulary[last], vocabulary["<|endoftext|>"] = 1, highest
    tokenizer["added_tokens"][1]["id"] = highest
    tokenizer["post_processor"]["special_tokens"]["<|endoftext|>"]["ids"] = [highest]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = CLIPModel.from_pretrained(folder)
    embedding = model.text_model.embeddings.token_embedding.weight.data
    embedding[[1, highest]] = embedding[[highest, 1]]
    model.save_pretrained(folder)
    texts = ["a red ring", "how many?"]
    ours = load_encoder(folder).encode_texts(texts)
    torch.testing.assert_close(ours.text_embed, clip.encode_texts(texts).text_embed)


def test_tokenizer_of_a_class_that_needs_sentencepiece(
    siglip: ImageTextEncoder, siglip_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(siglip_dir, tmp_path / "mine"))
    file = folder / "tokenizer_config.json"
    edit_json(file, lambda content: content.update(tokenizer_class="SiglipTokenizer"))
    ours = load_encoder(folder).encode_texts(["a red ring"])
    torch.testing.assert_close(ours.text_embed, siglip.encode_texts(["a red ring"]).text_embed)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble(file: Path) -> None:
    file.write_bytes(b"\xff\x00" + file.read_bytes()[2:])


@pytest.mark.parametrize(
    "damage", [truncate, garble, Path.unlink], ids=lambda damage: damage.__name__
)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_files(folder: Path, file: str, damage: Callable[[Path], None]) -> None:
    damage(folder / file)
    named = "tokenizer" if file == "tokenizer.json" else f"{file}|weights"
    refused(folder, named)


@pytest.mark.parametrize("damage", [truncate, garble])
def test_damaged_preprocessor(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / "preprocessor_config.json")
    refused(folder, "preprocessor_config.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(model_type="bert"), "model_type is 'bert'"),
        (lambda c: c.update(model_type="siglip2"), "variable resolution"),
        (lambda c: c.pop("model_type"), "model_type is None"),
        (lambda c: c["vision_config"].update(patch_size=0), "no grid"),
        (lambda c: c["vision_config"].update(image_size="large"), "config.json is damaged"),
        (lambda c: c["vision_config"].update(num_channels=1), "num_channels"),
        (lambda c: c["vision_config"].update(image_size=48), "48x48"),
        (lambda c: c["text_config"].update(hidden_size=48), "weights cannot be loaded"),
        (lambda c: c["text_config"].update(num_hidden_layers=3), "weights are missing"),
        (lambda c: c["text_config"].update(num_attention_heads=5), "config.json|weights"),
        (lambda c: c["text_config"].update(eos_token_id=9), "eos_token_id 9"),
        (lambda c: c["text_config"].update(vocab_size=300), "ids up to 359"),
        (lambda c: c.update(text_config=7), "config.json is damaged"),
    ],
)
def test_wrong_config(folder: Path, change: Callable[[dict[str, Any]], Any], named: str) -> None:
    edit_json(folder / "config.json", change)
    refused(folder, named)


def test_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")
    refused(folder, "not a JSON object")


def test_siglip_that_does_not_pool(tmp_path: Path) -> None:
    folder = tiny_siglip(tmp_path / "mine")
    config = folder / "config.json"
    edit_json(config, lambda content: content["vision_config"].update(vision_use_head=False))
    with pytest.raises(UserError, match="vision_use_head"):
        load_encoder(folder)


def test_tokenizer_rebuilt_after_other_rules(folder: Path) -> None:
    """CLIP's own class gives letters of this vocabulary the end token: all texts would be alike."""
    file = folder / "tokenizer_config.json"
    edit_json(file, lambda content: content.update(tokenizer_class="CLIPTokenizer"))
    refused(folder, "tokenizer_class")


def test_tokenizer_without_padding(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda content: content.pop("pad_token"))
    refused(folder, "no pad_token")


def test_index_without_a_map(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "no weight_map")


class _Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    mark = folder / "was-unpickled"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(mark)))
    refused(folder, "pickled weights")
    assert not mark.exists()


def test_code_in_the_directory_is_not_run(clip: ImageTextEncoder, folder: Path) -> None:
    mark = folder / "was-run"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    code = {"AutoModel": "own.Model", "AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}
    edit_json(folder / "config.json", lambda content: content.update(auto_map=code))
    edit_json(folder / "tokenizer_config.json", lambda content: content.update(auto_map=code))
    assert load_encoder(folder).fingerprint == clip.fingerprint
    assert not mark.exists()


@pytest.mark.parametrize("name", ["./no/such/place", "/no/such/place", "a/b/c", "?", "\0"])
def test_no_such_directory(name: str) -> None:
    with pytest.raises(UserError, match="no encoder directory"):
        load_encoder(name)


def test_name_that_is_too_long(hub_cache: Path) -> None:
    refused("x" * 5000, "nor in the local hub cache", local_files_only=True)


def test_a_file_is_no_directory(folder: Path) -> None:
    refused(folder / "config.json", "is a file")


@pytest.mark.parametrize("device", ["tpu9", "meta:x", "cuda:99"])
def test_device_that_is_not_there(clip_dir: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
        load_encoder(clip_dir, device=device)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that refuses every connection."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return cache


def cached(cache: Path, source: Path) -> Path:
    """Lay `source` into the cache as the hub's client does, under the id nobody/tiny."""
    repository = cache / "models--nobody--tiny"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return Path(shutil.copytree(source, repository / "snapshots" / revision))


def test_hub_id_from_the_cache(clip: ImageTextEncoder, clip_dir: Path, hub_cache: Path) -> None:
    cached(hub_cache, clip_dir)
    for local_files_only in (None, True):
        encoder = load_encoder("nobody/tiny", local_files_only=local_files_only)
        assert encoder.fingerprint == clip.fingerprint
        assert encoder.name == "nobody/tiny"


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs, on this machine."""

    protocol_version = "HTTP/1.1"
    revision = "fedcba9876543210fedcba9876543210fedcba98"
    repositories: ClassVar[dict[str, Path]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        for name, folder in self.repositories.items():
            if path.startswith(f"/{name}/resolve/"):
                return self.reply(200, (folder / path.rpartition("/")[2]).read_bytes())
            if path.startswith(f"/api/models/{name}/tree/"):
                files = [
                    {
                        "type": "file",
                        "path": file.name,
                        "size": file.stat().st_size,
                        "oid": file.name,
                    }
                    for file in folder.iterdir()
                ]
                return self.reply(200, json.dumps(files).encode())
            if path.startswith(f"/api/models/{name}"):
                files = [{"rfilename": file.name} for file in folder.iterdir()]
                about = {"id": name, "sha": self.revision, "siblings": files}
                return self.reply(200, json.dumps(about).encode())
        return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", self.revision)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    monkeypatch.setattr(_Hub, "repositories", {})
    monkeypatch.setattr(_Hub, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield _Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_hub_id_is_downloaded_once(clip: ImageTextEncoder, folder: Path, hub: type[_Hub]) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"of no use")
    hub.repositories["nobody/tiny"] = folder
    assert load_encoder("nobody/tiny").fingerprint == clip.fingerprint
    assert hub.asked
    assert not any("pytorch_model.bin" in path for path in hub.asked)
    hub.asked.clear()
    assert load_encoder("nobody/tiny").fingerprint == clip.fingerprint
    assert not hub.asked, "a complete copy is in the cache"
    load_encoder("nobody/tiny", local_files_only=False)
    assert hub.asked, "the newest version was asked for"


def test_hub_id_with_pickled_weights_is_not_downloaded(folder: Path, hub: type[_Hub]) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.repositories["nobody/tiny"] = folder
    refused("nobody/tiny", "has no model.safetensors")
    assert not any("resolve" in path for path in hub.asked)


def test_hub_id_that_does_not_exist(hub: type[_Hub]) -> None:
    refused("nobody/tiny", "no public repository on the hub; check the name")


def test_hub_id_without_network(hub_cache: Path) -> None:
    refused("nobody/tiny", "the hub cannot give it .*; give a local directory")


def test_hub_id_half_downloaded(clip_dir: Path, hub_cache: Path) -> None:
    (cached(hub_cache, clip_dir) / "model.safetensors").unlink()
    refused("nobody/tiny", "the hub cannot give it")


def test_hub_id_without_permission_to_ask(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("nobody/tiny", "nor in the local hub cache; download it", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("nobody/tiny", "HF_HUB_OFFLINE")
