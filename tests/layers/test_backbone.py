# SPDX-License-Identifier: Apache-2.0

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.v2.functional import normalize

from anomalib_recon.layers import BackboneNormalize, FrozenBackbone, stage_strides
from anomalib_recon.models import ADTR


def random_model(name: str) -> nn.Module:
    """A whole model of timm, classifier included, in which no tensor has the value it is created with."""
    model = timm.create_model(name, pretrained=False).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) * 0.1 + 0.01
    return model


def write(model: nn.Module, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (save_file if path.suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights in the cache, and no way out of this machine."""

    def fail(*args, **kwargs) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket, "create_connection", fail)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet18", None), ("resnet18", ["layer3", "layer1"]), ("test_efficientnet", None), ("test_convnext", None)],
)
def test_feature_maps_are_those_of_timm(name: str, layers: list[str] | None) -> None:
    torch.manual_seed(0)
    backbone = FrozenBackbone(name, layers, pre_trained=False)
    torch.manual_seed(0)
    plain = timm.create_model(name, pretrained=False, features_only=True).eval()
    images = torch.rand(2, 3, 64, 96)
    config = timm.get_pretrained_cfg(name)
    with torch.no_grad():
        expected = plain(normalize(images, config.mean, config.std))
    strides = stage_strides(name)
    chosen = [index for index, stage in enumerate(strides) if layers is None or stage in layers]
    maps = backbone(images)
    assert len(maps) == len(chosen)
    for features, index in zip(maps, chosen, strict=True):
        torch.testing.assert_close(features, expected[index])
        stride = list(strides.values())[index]
        assert features.shape[-2:] == (64 / stride, 96 / stride)
    assert backbone.num_channels == [features.shape[1] for features in maps]


def test_backbones_that_were_not_trained_on_imagenet_statistics_get_their_own() -> None:
    normalize = BackboneNormalize("vit_base_patch16_384")
    torch.testing.assert_close(normalize(torch.rand(1, 3, 4, 4) * 0 + 0.75), torch.full((1, 3, 4, 4), 0.5))


def test_nothing_about_a_backbone_changes_in_training() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = FrozenBackbone("resnet18", ["layer1"], pre_trained=False)

    model = Outer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    assert model.training
    assert not any(module.training for module in model.backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    assert not any(features.requires_grad for features in model.backbone(images))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_each_tensor_is_saved_once() -> None:
    backbone = FrozenBackbone("resnet18", pre_trained=False)
    saved = backbone.state_dict()
    assert len({tensor.data_ptr() for tensor in saved.values()}) == len(saved)
    classifier = 2
    assert len(saved) == len(timm.create_model("resnet18").state_dict()) - classifier


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet18", "weights.safetensors"),
        ("resnet18.a1_in1k", "weights.pth"),
        ("test_efficientnet", "weights.safetensors"),
        ("test_convnext", "weights.safetensors"),
    ],
)
def test_a_file_brings_all_weights(tmp_path: Path, name: str, file: str) -> None:
    model = random_model(name)
    backbone = FrozenBackbone(name, weights=write(model, tmp_path / file))
    # a model's names are those of its features but for the separator in nested ones
    expected = {key.replace(".", "_"): tensor for key, tensor in model.state_dict().items()}
    loaded = backbone.extractor.state_dict()
    assert len(loaded) > 50
    for key, tensor in loaded.items():
        assert torch.equal(tensor, expected[key.replace(".", "_")]), key


@pytest.mark.parametrize(
    ("name", "words"),
    [("resnet34", r"lacks \d+ of the \d+ tensors of resnet34, layer1.2.conv1.weight for one; pass a file of this"),
     ("test_efficientnet", r"lacks \d+ of the \d+ tensors of test_efficientnet")],
)  # fmt: skip
def test_a_file_of_another_model_is_refused(tmp_path: Path, name: str, words: str) -> None:
    file = write(timm.create_model("resnet18"), tmp_path / "resnet18.safetensors")
    with pytest.raises(ValueError, match=rf"^backbone_weights={file} {words}"):
        FrozenBackbone(name, weights=file)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    with pytest.raises(FileNotFoundError, match=rf"^backbone_weights={file} is not a file; pass a file"):
        FrozenBackbone("resnet18", weights=file)
    file.write_text("not weights")
    with pytest.raises(ValueError, match=rf"^backbone_weights={file} cannot be read"):
        FrozenBackbone("resnet18", weights=file)


@pytest.mark.usefixtures("no_network")
def test_weights_in_the_cache_need_no_network(tmp_path: Path) -> None:
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id="timm/resnet18.a1_in1k", repo_type="model")
    model = random_model("resnet18")
    write(model, folder / "snapshots" / "0123456789abcdef" / "model.safetensors")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123456789abcdef")
    backbone = FrozenBackbone("resnet18")
    for key, tensor in backbone.extractor.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("model", [ADTR, lambda: FrozenBackbone("tf_efficientnet_b4.aa_in1k")])
def test_missing_weights_without_network_are_named_at_once(model: type) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError) as error:
        model()
    assert time.monotonic() - start < 5
    [line] = str(error.value).splitlines()
    assert line.startswith("The weights of backbone='tf_efficientnet_b4.aa_in1k' are not in the local cache, and")
    assert "pass backbone_weights=FILE, or pre_trained=False" in line


def use_mirror(monkeypatch: pytest.MonkeyPatch, cache: Path, port: int) -> None:
    address = f"http://127.0.0.1:{port}/{{repo_id}}/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_host_that_does_not_answer_is_given_up_as_soon_as_the_hub_would(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("anomalib_recon.layers.backbone.HF_HUB_ETAG_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_mirror(monkeypatch, tmp_path, silent.getsockname()[1])
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="their host does not answer"):
            FrozenBackbone("resnet18")
        assert time.monotonic() - start < 5


class SlowMirror(BaseHTTPRequestHandler):
    """Serves one file, and takes four seconds to say that it has it."""

    content = b""

    def do_HEAD(self) -> None:
        time.sleep(4)
        self.answer()

    def do_GET(self) -> None:
        self.answer()
        self.wfile.write(self.content)

    def answer(self) -> None:
        self.send_response(200)
        headers = {"ETag": '"0123"', "X-Repo-Commit": 40 * "a", "Content-Length": str(len(self.content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args) -> None:
        """Say nothing."""


def test_a_slow_mirror_brings_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = random_model("test_convnext")
    content = write(model, tmp_path / "weights.safetensors").read_bytes()
    monkeypatch.setattr(SlowMirror, "content", content)
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowMirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        use_mirror(monkeypatch, tmp_path / "cache", server.server_port)
        loaded = FrozenBackbone("test_convnext").extractor.state_dict()
        server.shutdown()
    expected = {key.replace(".", "_"): tensor for key, tensor in model.state_dict().items()}
    for key, tensor in loaded.items():
        assert torch.equal(tensor, expected[key.replace(".", "_")]), key


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnet0"}, r"^backbone='resnet0' is not a model of timm .*; timm.list_models\(\) lists them"),
        ({"name": "resnet18", "layers": ["layer1", "layer9", "stem"]},
         r"^layers must be among act1, .* layer4, or be modules of backbone='resnet18', got layer9, stem"),
        ({"name": "resnet18", "layers": []}, "^layers must be among .*, got none"),
        ({"name": "resnet18.nobody_in1k"}, r"^backbone='resnet18.nobody_in1k' is not a model of timm"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FrozenBackbone(**{"pre_trained": False, **arguments})


def test_a_model_without_weights_is_named() -> None:
    assert timm.is_model("efficientnet_b8")
    with pytest.raises(
        ValueError, match=r"^timm has no weights for backbone='efficientnet_b8'; pass backbone_weights="
    ):
        FrozenBackbone("efficientnet_b8")
