"""Fuzzed: files and flags that hypothesis draws. A program ends well or with one line.

Quick by default and the same cases every time; `python -m pytest -m slow tests/test_fuzz.py` runs
many times as many.
"""

import csv
import dataclasses
import io
import json
import math
import pickle
import resource
import shutil
import signal
import tempfile
import typing
import zipfile
from contextlib import contextmanager
from pathlib import Path

import h5py
import hypothesis
import numpy as np
import pytest
import torch
from conftest import SAMPLE
from hypothesis import strategies as st
from learners import LEARNERS
from test_scripts import edit_json

import gta_augment
import gta_diffusion
import metrics

hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
pytestmark = pytest.mark.filterwarnings(
    "ignore::hypothesis.errors.HypothesisWarning", "ignore:Duplicate name"
)
MODULES = {"gta_diffusion": gta_diffusion, "gta_augment": gta_augment, **LEARNERS}
MODULES["metrics"] = metrics


@pytest.fixture(params=[1, pytest.param(10, marks=pytest.mark.slow)], ids=["quick", "slow"])
def fuzz(request):
    """Calls check(case) for every case that a strategy draws; nothing is left in a folder."""

    def run(cases, check, *strategies):
        settings = hypothesis.settings(
            max_examples=cases * request.param,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )

        @settings
        @hypothesis.given(st.tuples(*strategies))
        def check_all(case):
            check(*case)

        check_all()

    return run


class TooSlow(BaseException):
    """Nothing that a script catches."""


@contextmanager
def limits(seconds=20, gigabytes=4):
    """Bounds the time and the memory of a case, so that a hang and a flood are failures."""

    def stop(number, frame):
        raise TooSlow

    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    memory = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + gigabytes * 2**30, memory[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def ending(function, *args):
    """Calls function. Returns None, or the line with which it ended the program. All else fails."""
    try:
        with limits():
            function(*args)
    except SystemExit as end:
        assert isinstance(end.code, str) and end.code.startswith("error: "), end.code
        assert len(end.code.splitlines()) == 1, end.code
        return end.code


def files(folder):
    """The content of all files of a folder by path."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tensors(content):
    """All tensors and numbers in nested dictionaries and lists."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list | tuple):
        return [x for value in content for x in tensors(value)]
    return [torch.as_tensor(content)] if isinstance(content, float | torch.Tensor) else []


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def assert_whole(path):
    """A file that a script wrote can be read, and holds no NaN."""
    if path.suffix == ".json":
        json.loads(path.read_text(), parse_constant=no_constant)
    elif path.suffix == ".csv":
        rows = list(csv.reader(path.open()))[1:]
        assert all(math.isfinite(float(x)) for row in rows for x in row)
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        json.loads(str(arrays.pop("metadata")), parse_constant=no_constant)
        assert all(np.isfinite(x).all() for x in arrays.values())
    else:
        assert path.suffix == ".pt", path
        content = torch.load(path, weights_only=True)
        assert all(x.isfinite().all() for x in tensors(content))


# --- a small pipeline ---


SMALL = {
    "gta_diffusion": {"horizon": 1, "dim": 8, "batch_size": 4, "train_steps": 2},
    "gta_augment": {"num_transitions": 8, "num_steps": 3, "batch_size": 4},
    **dict.fromkeys(LEARNERS, {"train_steps": 2, "batch_size": 4, "eval_episodes": 1}),
    "metrics": {"num_transitions": 10, "workers": 1},
}
SMALL["dt"] = {**SMALL["dt"], "context": 2, "embedding_dim": 8, "num_layers": 1}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a dataset of two short episodes, whose environment stops after 5 steps, and
    what every script makes of it: diffusion.pt, buffer.npz, <learner>.pt and its folder."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "set" / "data").mkdir(parents=True)
    source, target = (root / "data" / "main_data.hdf5" for root in (SAMPLE, folder / "set"))
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        for i in range(2):
            episode = new.create_group(f"episode_{i}")
            episode.attrs.update({**old[f"episode_{i}"].attrs, "id": i, "total_steps": 20})
            for key, data in old[f"episode_{i}"].items():
                if key != "infos":
                    episode[key] = data[-20 - (key == "observations") :]
    metadata = folder / "set" / "data" / "metadata.json"
    shutil.copy(SAMPLE / "data" / "metadata.json", metadata)
    spec = json.loads(json.loads(metadata.read_text())["eval_env_spec"])
    spec = json.dumps({**spec, "max_episode_steps": 5})
    edit_json(metadata, total_episodes=2, total_steps=40, eval_env_spec=spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, module in MODULES.items():
            module.main(make_args(name, folder))
    for name in LEARNERS:
        (run,) = (folder / "runs").glob(f"{name}-*")
        run.rename(folder / name)
    return folder


def make_args(name, folder, **changes):
    """Arguments of a script that reads what `small` holds and writes into the current folder."""
    if name == "metrics":
        places = {"aug": (folder / "buffer.npz",)}
    elif name == "gta_augment":
        places = {"checkpoint": folder / "diffusion.pt"}
    else:
        places = {"env": str(folder / "set")}
    small = {**SMALL[name], "device": "cpu"}
    return MODULES[name].Args(**{**places, **small, **changes})


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- what is drawn ---


TEXT = st.text(max_size=5) | st.sampled_from(["\ud800", "a\nb", "gta", "none", "../x", "nan"])
NUMBERS = st.integers(-3, 3) | st.floats() | st.sampled_from([2**31, 2**63, -(2**63), 10**30])
PLAIN = st.none() | st.booleans() | NUMBERS | TEXT
ANYTHING = st.recursive(
    PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=5
)
BROKEN_JSON = st.sampled_from(["[" * 100_000, "9" * 5000, "", "null", "{}", "[]", '"', "1e999"])


@st.composite
def places(draw, content):
    """The path of a value in nested dictionaries and lists: keys and indices."""
    path = ()
    while isinstance(content, dict | list) and content and (not path or draw(st.booleans())):
        keys = sorted(content, key=str) if isinstance(content, dict) else range(len(content))
        path += (draw(st.sampled_from(keys)),)
        content = content[path[-1]]
    return path


def put(content, path, value):
    """content, nested dictionaries and lists, with another value at a path; a copy."""
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = put(content[path[0]], path[1:], value)
    return copy


@st.composite
def mutated(draw, content, values=ANYTHING):
    """Nested dictionaries and lists with one or two values missing, swapped or replaced."""
    for _ in range(draw(st.integers(1, 2))):
        path, value = draw(places(content)), draw(values)
        kind = draw(st.sampled_from(["replace", "replace", "swap", "delete"]))
        if kind == "swap":
            value = content
            for key in draw(places(content)):
                value = value[key]
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        if path and kind == "delete" and isinstance(parent, dict):
            rest = {key: x for key, x in parent.items() if key != path[-1]}
            content = put(content, path[:-1], rest)
        else:
            content = put(content, path, value)
    return content


def mutated_json(text, nested=()):
    """Changed JSON text; the values of the keys in nested are JSON text themselves."""
    content = json.loads(text)
    content |= {key: json.loads(content[key]) for key in nested}

    def pack(content):
        if isinstance(content, dict):
            inner = {key: json.dumps(content[key]) for key in nested if key in content}
            content = {**content, **inner}
        return json.dumps(content)

    return mutated(content).map(pack) | BROKEN_JSON


@st.composite
def mutated_bytes(draw, content):
    """Bytes that are flipped, cut out, repeated, put in or cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        size = draw(st.sampled_from([1, 2, 8, 100, 10_000]))
        kind = draw(st.sampled_from(["flip", "delete", "repeat", "insert", "truncate"]))
        if kind == "flip":
            content[at : at + 1] = bytes(
                b ^ draw(st.integers(1, 255)) for b in content[at : at + 1]
            )
        elif kind == "delete":
            del content[at : at + size]
        elif kind == "repeat":
            content[at:at] = content[at : at + size]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        else:
            del content[at:]
    return bytes(content)


class Trap:
    """Unpickling this makes a file."""

    def __reduce__(self):
        return (Path.touch, (Path("trap"),))


@st.composite
def mutated_zip(draw, content):
    """A zip file whose members are swapped, renamed, missing or changed. Its checksums fit."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name, other = (draw(st.sampled_from(sorted(members))) for _ in range(2))
    kind = draw(st.sampled_from(["change", "trap", "swap", "rename", "delete"]))
    if kind == "change":
        members[name] = draw(mutated_bytes(members[name]))
    elif kind == "trap":
        members[name] = pickle.dumps(Trap())
    elif kind == "swap":
        members[name], members[other] = members[other], members[name]
    else:
        value = members.pop(name)
        if kind == "rename":
            members[draw(st.sampled_from(["other", "../x", "a\nb", "data.pkl"]))] = value
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for name, value in members.items():
            new.writestr(name, value)
    return file.getvalue()


SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
DTYPES = ["f2", "f4", ">f8", "i1", "i8", "u1", "?", "c8", "U3", "S2", "M8[s]", "f4,i4", "O", "V0"]


@st.composite
def arrays(draw, like):
    """An array of another type, shape or with other values than an array `like`."""
    kind = draw(st.sampled_from(["dtype", "shape", "both", "value"]))
    if kind == "value":
        array = like.copy()
        if array.size and array.dtype.kind == "f":
            extremes = st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38])
            array.flat[draw(st.integers(0, array.size - 1))] = draw(extremes)
        return array
    shape = draw(SHAPES) if kind != "dtype" else like.shape
    dtype = draw(st.sampled_from(DTYPES)) if kind != "shape" else like.dtype
    return np.zeros(shape, dtype)


@st.composite
def mutated_npz(draw, content):
    """buffer.npz with other arrays, other metadata, or a header that promises too much."""
    with np.load(io.BytesIO(content)) as file:
        members = {key: file[key] for key in file.files}
    key = draw(st.sampled_from(sorted(members)))
    kind = draw(st.sampled_from(["array", "metadata", "delete", "trap", "header"]))
    if kind == "metadata":
        members["metadata"] = np.array(draw(mutated_json(str(members["metadata"]))))
    elif kind == "trap":
        members[key] = np.array([Trap()], object)
    elif kind != "header":
        array = members.pop(key)
        if kind == "array":
            members[key] = draw(arrays(array))
    file = io.BytesIO()
    np.savez(file, **members)
    if kind == "header":
        size, dtype = (
            draw(st.sampled_from([10**9, 10**12, 2**62, -1])),
            draw(st.sampled_from(DTYPES)),
        )
        header = {"descr": np.dtype(dtype).descr, "fortran_order": False, "shape": (size, 1)}
        member = io.BytesIO()
        np.lib.format.write_array_header_1_0(member, header)
        with zipfile.ZipFile(file, "a") as more:
            more.writestr(f"{draw(st.sampled_from([key, 'more']))}.npy", member.getvalue())
    return file.getvalue()


def mutated_pt(content):
    """A file of torch.save with other values; its checksums are right."""
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.cfloat])
    fill = st.sampled_from([0, 1, 7])
    values = st.builds(lambda *x: torch.full(x[0], x[1], dtype=x[2]), SHAPES, fill, dtypes)
    values |= st.builds(lambda shape: torch.full(shape, torch.nan), SHAPES) | ANYTHING

    return mutated(content, values).map(pack)


# --- readers ---


def test_buffers(fuzz, small, tmp_path):
    """Whatever is in buffer.npz, a reader and what comes after it end well or with one line."""
    content = (small / "buffer.npz").read_bytes()
    path = tmp_path / "buffer.npz"
    dataset = gta_diffusion.load_dataset(str(small / "set"))

    def use(module):
        buffer, metadata = module.read_buffer(path)
        module.require_fit(path, buffer, metadata, dataset)
        module.describe_buffer(metadata)
        if module is metrics:
            return
        args = module.Args(aug=path)
        dataset_, episodes, buffer, _ = module.load_episodes(args)
        module.fill_in_by_domain(args, dataset_.env_id)
        module.make_scaling(episodes, dataset_.source.action_space)

    def check(content):
        path.write_bytes(content)
        for module in (LEARNERS["td3bc"], LEARNERS["dt"], metrics):
            ending(use, module)
        ending(gta_augment.is_there, gta_augment.Args(out=path), {"alpha": 1.1})
        assert files(tmp_path) == {Path("buffer.npz"): content}

    fuzz(100, check, mutated_npz(content) | mutated_zip(content) | mutated_bytes(content))


@pytest.mark.parametrize("name", ["td3bc", "dt", "metrics"])
def test_programs_that_read_a_buffer(name, fuzz, small, tmp_path):
    path = tmp_path / "buffer.npz"

    def check(content):
        path.write_bytes(content)
        aug = (path,) if name == "metrics" else path
        run_and_check(name, tmp_path, make_args(name, small, aug=aug), keep="buffer.npz")

    fuzz(15, check, mutated_npz((small / "buffer.npz").read_bytes()))


def run_and_check(name, folder, args, keep=None):
    """Runs a script. What it writes is whole, and goes again; nothing else changes."""
    before = files(folder)
    end = ending(MODULES[name].main, args)
    after = files(folder)
    new = {path for path in after if after[path] != before.get(path)}
    new.discard(Path("MUJOCO_LOG.TXT"))  # MuJoCo's own, where a state makes no sense
    known = {"diffusion.pt", "buffer.npz", "metrics.json", "config.json", "evals.csv", "policy.pt"}
    for path in new:
        assert_whole(folder / path)
    assert {path.name for path in new} <= known and before.keys() <= after.keys()
    for path in folder.iterdir():
        if path.name != keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return end


def thin(content):
    """What torch.load returned, each tensor's first number instead of all: small on the disk."""
    if isinstance(content, dict):
        return {key: thin(x) for key, x in content.items()}
    if not torch.is_tensor(content) or content.dtype == torch.uint8:
        return content
    return content.flatten()[:1].clone().expand(content.numel()).view(content.shape)


def pack(content):
    """The bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_checkpoints(fuzz, small, tmp_path):
    """Whatever is in diffusion.pt: the readers of stage A and B, and both programs."""
    path = tmp_path / "diffusion.pt"

    def read(content):
        path.write_bytes(content)
        ending(gta_augment.load_checkpoint, path)
        ending(gta_diffusion.load_checkpoint, path)
        assert files(tmp_path) == {Path("diffusion.pt"): content}

    def use(content, name):
        path.write_bytes(content)
        changes = {"checkpoint": path} if name == "gta_augment" else {"resume": True, "out": path}
        return run_and_check(name, tmp_path, make_args(name, small, **changes))

    checkpoint = torch.load(small / "diffusion.pt", weights_only=True)
    checkpoint = {**thin(checkpoint), "step": 1}
    content = pack(checkpoint)
    fuzz(40, read, mutated_zip(content) | mutated_bytes(content))
    names = st.sampled_from(["gta_augment", "gta_augment", "gta_diffusion"])
    fuzz(20, use, mutated_pt(checkpoint), names)
    assert use(content, "gta_augment") is None  # unchanged they work
    assert use(content, "gta_diffusion") is None


@pytest.mark.parametrize("name", LEARNERS)
def test_policies(name, fuzz, small, tmp_path):
    """Whatever is in policy.pt: its reader, --load and --resume."""
    path, module = tmp_path / "policy.pt", LEARNERS[name]

    def read(content):
        path.write_bytes(content)
        ending(module.load_policy, path, "--load")
        assert files(tmp_path) == {Path("policy.pt"): content}

    def use(content, resume):
        path.write_bytes(content)
        if resume:
            args = module.Args(resume=tmp_path, device="cpu")
        else:
            args = make_args(name, small, load=path, train_steps=0)
        return run_and_check(name, tmp_path, args)

    policy = torch.load(small / name / "policy.pt", weights_only=True)
    policy = {**thin(policy), "update": 1}
    content = pack(policy)
    fuzz(15, read, mutated_zip(content) | mutated_bytes(content))
    fuzz(20, use, mutated_pt(policy), st.booleans())
    assert use(content, False) is None and use(content, True) is None  # unchanged they work


EPISODE = ["observations", "actions", "rewards", "terminations", "truncations"]


@st.composite
def mutated_hdf5(draw, content):
    """The datasets' main_data.hdf5 with another array, attribute or group, or changed bytes."""
    kind = draw(st.sampled_from(["array", "array", "delete", "attribute", "group", "bytes"]))
    if kind == "bytes":
        return draw(mutated_bytes(content))
    file = io.BytesIO(content)
    with h5py.File(file, "r+") as h5:
        episode = h5[draw(st.sampled_from(["episode_0", "episode_1"]))]
        key = draw(st.sampled_from(EPISODE))
        if kind == "attribute":
            episode.attrs[draw(st.sampled_from(["id", "total_steps", "seed", "new"]))] = draw(
                st.integers(-3, 3) | st.floats() | st.just("text") | st.just([1, 2])
            )
        else:
            array = episode[key][:]
            del episode[key]
            if kind == "group":
                episode.create_group(key)
            elif kind == "array":
                new = draw(arrays(array))
                hypothesis.assume(new.dtype.kind not in "OUMV")  # which HDF5 does not know
                episode[key] = new
    return file.getvalue()


def test_datasets(fuzz, small, tmp_path):
    """Whatever is in a dataset's folder: its reader and the programs that start from it."""
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    parts = {path.name: path.read_bytes() for path in (small / "set" / "data").iterdir()}

    def write(name, content):
        for other, original in parts.items():
            (data / other).write_bytes(original)
        (data / name).write_bytes(content)

    def read(name, content):
        write(name, content)
        ending(gta_diffusion.load_dataset, str(tmp_path / "set"))
        assert files(data) == {Path(key): x for key, x in {**parts, name: content}.items()}

    def use(script, name, content):
        write(name, content)
        args = make_args(script, small)
        run_and_check(script, tmp_path, dataclasses.replace(args, env=str(tmp_path / "set")), "set")

    metadata = parts["metadata.json"].decode()
    nested = ("observation_space", "action_space", "env_spec", "eval_env_spec")
    text = mutated_json(metadata, nested).map(lambda text: text.encode(errors="surrogatepass"))
    changes = st.tuples(st.just("metadata.json"), text | mutated_bytes(parts["metadata.json"]))
    changes |= st.tuples(st.just("main_data.hdf5"), mutated_hdf5(parts["main_data.hdf5"]))
    fuzz(80, lambda change: read(*change), changes)
    scripts = st.sampled_from(["gta_diffusion", "td3bc", "dt", "metrics"])
    fuzz(40, lambda script, change: use(script, *change), scripts, changes)


def test_folders_of_runs(fuzz, small, tmp_path):
    """Whatever is in config.json and evals.csv, metrics tabulates it or ends with one line."""
    config = (small / "td3bc" / "config.json").read_text()
    evals = (small / "td3bc" / "evals.csv").read_bytes()

    def check(config, evals, table):
        runs = tmp_path / "one", small / "td3bc", small / "iql"
        runs[0].mkdir(exist_ok=True)
        (runs[0] / "config.json").write_bytes(config.encode(errors="surrogatepass"))
        (runs[0] / "evals.csv").write_bytes(evals)
        before = files(tmp_path)
        ending(metrics.main, metrics.Args(runs=runs, table=table))
        assert files(tmp_path) == before

    texts = st.just(config) | mutated_json(config)
    rows = st.tuples(NUMBERS | TEXT, NUMBERS | TEXT, NUMBERS, NUMBERS | TEXT)
    tables = st.lists(rows.map(lambda row: ",".join(map(str, row))), max_size=3)
    tables = tables.map(lambda rows: "\n".join(["update,seed,return,score", *rows]))
    tables = tables.map(lambda text: text.encode(errors="surrogatepass"))
    tables |= st.just(evals) | mutated_bytes(evals) | st.binary(max_size=30)
    fuzz(200, check, texts, tables, st.sampled_from(["text", "markdown", "latex"]))


# --- flags ---


def numeric_fields(module):
    """The flags that take a number: name -> int or float."""
    hints = typing.get_type_hints(module.Args)
    kinds = {name: {hint, *typing.get_args(hint)} for name, hint in hints.items()}
    return {
        name: float if float in kind else int for name, kind in kinds.items() if kind & {int, float}
    }


ALL_FLAGS = [(name, key) for name, module in MODULES.items() for key in numeric_fields(module)]


@pytest.mark.parametrize("name, key", ALL_FLAGS)
def test_no_flag_takes_what_is_no_number(name, key, small, tmp_path, capsys):
    """NaN, infinity, what is out of all bounds: one line that names the flag, before the work."""
    is_float = numeric_fields(MODULES[name])[key] is float
    values = (math.nan, math.inf, -math.inf, -1e30, 1e308) if is_float else (-(10**30), 10**30)
    for value in values:
        end = ending(MODULES[name].main, make_args(name, small, **{key: value}))
        flag = f"--{key.replace('_', '-')}"
        assert end and end.startswith(f"error: {flag} {value}: must "), (end, value)
    assert "dataset: " not in capsys.readouterr().out and not files(tmp_path)


LONG = {
    "train_steps",
    "num_transitions",
    "num_steps",
    "eval_episodes",
    "workers",
}  # so many, so long


@st.composite
def extreme_flags(draw, module):
    """One to three flags with values that few people give."""
    fields = numeric_fields(module)
    fields.pop("eval_workers", None)  # would start many processes
    flags = {}
    for key in draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True)):
        if fields[key] is float:
            edges = [0.0, -1.0, 1.0, 1e-320, 1e-9, 1e6, 1e11, 1e308, -1e6, math.nan, math.inf]
            flags[key] = draw(st.sampled_from(edges) | st.floats())
        else:
            edges = [0, -1, 1, 2, 3, 7, 2**31, 2**32, 2**63, 10**30]
            edges += [] if key in LONG else [10**10, 10**11]
            flags[key] = draw(
                st.sampled_from([x for x in edges if key not in LONG or x < 9 or x > 10**12])
            )
    return flags


@pytest.mark.parametrize("name", MODULES)
def test_flags(name, fuzz, small, tmp_path):
    """A run goes well or ends with one line that names a flag; what it wrote is whole."""

    def check(flags):
        end = run_and_check(name, tmp_path, make_args(name, small, **flags))
        assert end is None or "--" in end, end

    fuzz(25, check, extreme_flags(MODULES[name]))
