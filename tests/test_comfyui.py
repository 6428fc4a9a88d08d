"""The nodes for ComfyUI, run by a stand-in for it that checks, runs and keeps as its executor does:
https://docs.comfy.org/custom-nodes/backend/server_overview."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sfmodel.pretrained import TOY_WEIGHTS, find_preset, load_toy
from sfmodel.saved_stream import read_notes
from sfmodel.stream import Stream
from sfmodel.toy import world
from sfmodel.weights import known
from sfmodel.weights.checkpoint import read
from sfmodel.weights.known import Known

ROOT = Path(__file__).parent.parent
PACK = ROOT / "integrations" / "comfyui"
WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
RED, BLUE = "a large red ball moves up slowly", "a large blue ball"
Graph = dict[str, dict[str, Any]]


class InterruptedByUserError(Exception):
    pass


class Comfy:
    """Nodes of a pack, and what ComfyUI keeps between two runs. ran: classes, in order."""

    def __init__(self, nodes: dict[str, Any], output: Path) -> None:
        self.nodes, self.output = nodes, output
        self.kept: dict[str, tuple[Any, ...]] = {}
        self.ran: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.stop_after = sys.maxsize  # checks for an interruption

    def check(self, graph: Graph) -> None:
        """Raises AssertionError for a graph that ComfyUI would refuse, and casts its widgets."""
        for node in graph.values():
            types = self.nodes[node["class_type"]].INPUT_TYPES()
            inputs = node["inputs"]
            missing = types["required"].keys() - inputs.keys()
            assert not missing, f"required_input_missing: {missing}"
            for name, info in {**types["required"], **types.get("optional", {})}.items():
                kind, options = info[0], info[1] if len(info) > 1 else {}
                value = inputs.get(name)
                if isinstance(value, list):
                    source, slot = value
                    given = self.nodes[graph[source]["class_type"]].RETURN_TYPES[slot]
                    assert given == kind, f"return_type_mismatch: {name} is {kind}, not {given}"
                elif name in inputs:
                    if isinstance(kind, list):
                        assert value in kind, f"value_not_in_list: {name}"
                        continue
                    value = inputs[name] = WIDGETS[kind](value)
                    assert value >= options.get("min", value), f"value_smaller_than_min: {name}"
                    assert value <= options.get("max", value), f"value_bigger_than_max: {name}"

    def key(self, graph: Graph, at: str) -> str:
        """What a node's outputs are kept under: its class, IS_CHANGED, inputs and ancestors."""
        node = graph[at]
        cls, inputs = self.nodes[node["class_type"]], node["inputs"]
        changed = None
        if hasattr(cls, "IS_CHANGED"):
            links = {name: None for name, value in inputs.items() if isinstance(value, list)}
            changed = cls.IS_CHANGED(**inputs | links)
        above = {
            name: [self.key(graph, value[0]), value[1]] if isinstance(value, list) else value
            for name, value in inputs.items()
        }
        return json.dumps([node["class_type"], changed, sorted(above.items())])

    def run(self, graph: Graph) -> dict[str, tuple[Any, ...]]:
        """What each node gives, its links before it; kept for the next run."""
        self.check(graph)
        self.ran.clear()
        keys = {at: self.key(graph, at) for at in graph}
        kept: dict[str, tuple[Any, ...]] = {}

        def outputs(at: str) -> tuple[Any, ...]:
            if keys[at] in self.kept:
                kept[keys[at]] = self.kept[keys[at]]
            if keys[at] not in kept:
                cls, inputs = self.nodes[graph[at]["class_type"]], graph[at]["inputs"]
                values = {
                    name: outputs(value[0])[value[1]] if isinstance(value, list) else value
                    for name, value in inputs.items()
                }
                given = getattr(cls(), cls.FUNCTION)(**values)
                self.ran.append(graph[at]["class_type"].removeprefix("SFModel"))
                given = given["result"] if isinstance(given, dict) else given
                assert isinstance(given, tuple) and len(given) == len(cls.RETURN_TYPES)
                for kind, value in zip(cls.RETURN_TYPES, given, strict=True):
                    assert kind != "IMAGE" or is_image(value)
                kept[keys[at]] = given
            return kept[keys[at]]

        with torch.inference_mode():
            try:
                return {at: outputs(at) for at in graph}
            finally:
                self.kept = self.kept | kept

    def modules(self) -> dict[str, ModuleType]:
        """Modules of ComfyUI that the pack imports."""
        comfy = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total, self.current = total, 0

            def update(self, value: int) -> None:
                self.current += value
                comfy.progress.append((self.current, self.total))

        def throw() -> None:
            self.stop_after -= 1
            if self.stop_after < 0:
                raise InterruptedByUserError

        names = ("comfy", "comfy.model_management", "comfy.utils", "folder_paths")
        made: dict[str, Any] = {name: ModuleType(name) for name in names}
        made["comfy.model_management"].throw_exception_if_processing_interrupted = throw
        made["comfy.utils"].ProgressBar = ProgressBar
        made["folder_paths"].get_output_directory = lambda: str(self.output)
        return made


def is_image(value: Tensor) -> bool:
    host = value.dtype == torch.float32 and value.device.type == "cpu"
    return host and value.shape[3:] == (3,) and bool(0 <= value.min() <= value.max() <= 1)


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comfy:
    """ComfyUI with the pack in custom_nodes, as a link under another name."""
    comfy = Comfy({}, tmp_path / "output")
    for name, module in comfy.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "custom_nodes").mkdir()
    pack = tmp_path / "custom_nodes" / "sf-nodes"
    pack.symlink_to(PACK)
    name = str(pack).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, pack / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    comfy.nodes = module.NODE_CLASS_MAPPINGS
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == comfy.nodes.keys()
    return comfy


def node(name: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": f"SFModel{name}", "inputs": inputs}


def graph(blue: str = BLUE, **of_stream: Any) -> Graph:
    """A red ball, then another one, saved."""
    own: dict[str, Any] = {
        "model": ["1", 0],
        "prompt": RED,
        "seed": 7,
        "frames": 25,
        "steps": "",
        "window": 0,
        "sink": -1,
    }
    return {
        "1": node("Load", preset="toy", checkpoint=""),
        "2": node("Stream", **own | of_stream),
        "3": node("Steer", stream=["2", 1], prompt=blue, frames=24),
        "4": node("SaveState", stream=["3", 1], file="ball/a.state"),
    }


def colours(images_NHWC: Tensor) -> list[str]:
    pixels = images_NHWC.permute(0, 3, 1, 2)[None] * 2 - 1
    return [[*world.COLOURS][i] for i in world.measure(pixels).colour_BT[0].tolist()]


def test_the_interface(comfy: Comfy) -> None:
    given = {"IMAGE"} | {kind for cls in comfy.nodes.values() for kind in cls.RETURN_TYPES}
    for cls in comfy.nodes.values():
        types = cls.INPUT_TYPES()
        assert types.keys() <= {"required", "optional"} and isinstance(cls.CATEGORY, str)
        assert len(getattr(cls, "RETURN_NAMES", ())) == len(cls.RETURN_TYPES)
        assert cls.RETURN_TYPES or cls.OUTPUT_NODE
        inputs = types["required"] | types.get("optional", {})
        parameters = [*inspect.signature(getattr(cls, cls.FUNCTION)).parameters.values()][1:]
        assert {p.name for p in parameters} == inputs.keys()
        for p in parameters:
            assert (p.default is p.empty) == (p.name in types["required"])
        for kind, *options in inputs.values():
            assert isinstance(kind, list) or kind in (*WIDGETS, *given)
            if not isinstance(kind, list) and kind in WIDGETS:
                assert isinstance(options[0]["default"], WIDGETS[kind])
        json.dumps(types)  # as the browser is told


def test_from_a_prompt_to_another(comfy: Comfy) -> None:
    """Equal to the stream in Python, bit for bit, with progress up to the last frame."""
    out = comfy.run(graph())
    red, blue = out["2"][0], out["3"][0]
    assert {*colours(red)} == {"red"} and {*colours(blue)[12:]} == {"blue"}
    assert comfy.progress[-1] == (24, 24) and (25, 25) in comfy.progress
    model, codec, encode = load_toy()
    stream = Stream(model, codec, encode([RED], model.device), find_preset("toy"), seed=7)
    frames = torch.cat([*stream.frames(25)], 1)
    stream.set_prompt(encode([BLUE], model.device))
    frames = torch.cat([frames, *stream.frames(24)], 1)
    assert torch.equal(torch.cat([red, blue]), frames[0].float() / 255)


def test_what_was_kept_is_as_it_was(comfy: Comfy) -> None:
    """Another prompt runs what is behind it alone, from the stream as its node gave it."""
    first = comfy.run(graph())
    assert comfy.ran == ["Load", "Stream", "Steer", "SaveState"]
    green = comfy.run(graph("a large green ball"))
    assert comfy.ran == ["Steer", "SaveState"] and {*colours(green["3"][0])[12:]} == {"green"}
    comfy.kept = {key: kept for key, kept in comfy.kept.items() if BLUE not in key}
    again = comfy.run(graph())
    assert comfy.ran == ["Steer", "SaveState"] and torch.equal(first["3"][0], again["3"][0])
    comfy.run(graph(""))
    assert comfy.ran == ["Steer", "SaveState"]


def test_settings(comfy: Comfy) -> None:
    """Of a stream of one's own: they take the place of the model's."""
    red = comfy.run(graph(steps="1000, 500", window=5, sink=1, frames=13))["2"][0]
    model, codec, encode = load_toy()
    settings = replace(find_preset("toy"), steps=(1000, 500), window=5, sink=1)
    stream = Stream(model, codec, encode([RED], model.device), settings, seed=7)
    assert torch.equal(red, torch.cat([*stream.frames(13)], 1)[0].float() / 255)


def test_a_published_checkpoint(
    comfy: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comes with the settings and the part of it that it was published with."""
    found = Known("ours", "owner/ours", "a/ours.pt", {"window": 5}, "generator_ema", preset="toy")
    monkeypatch.setattr(known, "KNOWN", (found,))
    weights, file = read(TOY_WEIGHTS)[0], tmp_path / "a" / "ours.pt"
    file.parent.mkdir()
    other = {name: torch.zeros_like(x) for name, x in weights.items()}
    torch.save({"generator": other, "generator_ema": weights}, file)
    made = graph(frames=25)
    plain = comfy.run(made)["2"][0]
    made["1"]["inputs"]["checkpoint"] = str(file)
    published = comfy.run(made)["2"][0]
    made["1"]["inputs"]["checkpoint"] = ""
    made["2"]["inputs"]["window"] = 5
    assert torch.equal(published, comfy.run(made)["2"][0]) and not torch.equal(published, plain)


def test_an_image_to_start_with(comfy: Comfy) -> None:
    """The video's first frame, as far as the codec keeps it; a larger one is scaled."""
    image = torch.zeros(1, 128, 256, 3)
    image[:, 44:84, 108:148] = torch.tensor(world.COLOURS["green"])
    comfy.nodes["Image"] = type(
        "Image", (), {
            "INPUT_TYPES": classmethod(lambda cls: {"required": {}}), "FUNCTION": "give",
            "RETURN_TYPES": ("IMAGE",), "give": lambda self: (image,),
        },
    )  # fmt: skip
    made = graph(start=["5", 0], prompt="a large green ball moves up slowly")
    red = comfy.run({**made, "5": {"class_type": "Image", "inputs": {}}})["2"][0]
    wanted = torch.nn.functional.avg_pool2d(image[0].permute(2, 0, 1), 2)[:, :, 32:96]
    assert (red[0].permute(2, 0, 1) - wanted).abs().mean() < 0.05
    assert {*colours(red)} == {"green"}


def test_an_interruption(comfy: Comfy) -> None:
    """Ends a stream between two chunks; what was there before goes on as it would have."""
    whole = comfy.run(graph())
    comfy.kept = {key: kept for key, kept in comfy.kept.items() if BLUE not in key}
    comfy.stop_after = 1
    with pytest.raises(InterruptedByUserError):
        comfy.run(graph())
    comfy.stop_after = sys.maxsize
    assert torch.equal(comfy.run(graph())["3"][0], whole["3"][0])
    assert comfy.ran == ["Steer", "SaveState"]


def test_a_saved_stream(comfy: Comfy) -> None:
    """Goes on as the one that was saved, and is read anew when it is another one."""
    first = comfy.run(graph())
    file = comfy.output / "ball" / "a.state"
    assert read_notes(file) == {"preset": "toy", "title": f"{RED} > {BLUE}"}
    loaded = {
        "1": node("Load", preset="toy", checkpoint=""),
        "2": node("LoadState", model=["1", 0], file="ball/a.state"),
        "3": node("Steer", stream=["2", 0], prompt="", frames=12),
    }
    more = comfy.run(loaded)["3"][0]
    longer = graph() | {"5": node("Steer", stream=["3", 1], prompt="", frames=12)}
    assert torch.equal(more, comfy.run(longer)["5"][0]) and first["3"][0].shape[0] == 24
    comfy.run(loaded)
    assert not comfy.ran
    os.utime(file, ns=(0, 0))
    comfy.run(loaded)
    assert comfy.ran == ["LoadState", "Steer"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ["3", 1]}, "return_type_mismatch: model is SFMODEL, not SFSTREAM"),
        ({"seed": 2**63}, "value_bigger_than_max: seed"),
        ({"frames": 0}, "value_smaller_than_min: frames"),
    ],
)
def test_what_comfyui_refuses(comfy: Comfy, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        comfy.run(graph(**changes))


@pytest.mark.parametrize(
    ("at", "changes", "said"),
    [
        ("1", {"checkpoint": "/nowhere.pt"}, "/nowhere.pt: there is no such checkpoint file"),
        ("1", {"preset": "wan-14b"}, "holds no|has no public"),
        ("1", {"checkpoint": "longlive_base.pt"}, "is LongLive 1.3B: goes with .* wan-1.3b"),
        ("2", {"steps": "many"}, "steps='many': must be numbers, as 1000 750 500 250"),
        ("2", {"steps": "500 1000"}, "must fall from at most 1000 to at least 1"),
        ("2", {"window": 2}, "window=2"),
        ("4", {"file": "../elsewhere.state"}, "../elsewhere.state: must be a file in"),
    ],
)
def test_what_the_nodes_refuse(
    comfy: Comfy, at: str, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFMODEL_MODELS", str(comfy.output.parent))
    made = graph(frames=1)
    made[at]["inputs"] |= changes
    with pytest.raises(ValueError, match=said) as raised:
        comfy.run(made)
    assert "\n" not in str(raised.value)


def test_the_registry_is_told_what_is_so() -> None:
    same = r"^(?:name|version|requires-python) = .*$"
    ours, pack = ((folder / "pyproject.toml").read_text() for folder in (ROOT, PACK))
    assert re.findall(same, pack, re.M) == re.findall(same, ours, re.M)
    assert 'dependencies = ["sfkernels[model,text]"]' in pack
