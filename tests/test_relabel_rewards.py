"""baselines/relabel_rewards.py: the reward proxy of E.7, and what it does to a buffer."""

import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import HOPPER, ROOT, run

import relabel_rewards as R


def test_it_learns_a_function_of_state_and_action_but_no_noise():
    torch.manual_seed(0)
    sa = torch.randn(4000, 4)
    known = 3 * sa[:, 0] * sa[:, 3] + sa[:, 1].abs()
    known = (known - known.mean()) / known.std()
    noise = torch.column_stack([sa, torch.randn(4000)])
    assert R.r_squared(R.fit_reward_proxy(noise[200:], 600), noise[:200]) < 0.1
    rows = torch.column_stack([sa, known])
    proxy = R.fit_reward_proxy(rows[200:], 1500)
    error = (proxy(sa.view(40, 100, 4)) - known.view(40, 100)).square()
    assert error.mean() < 0.05
    r_squared = R.r_squared(proxy, rows[:200])
    assert r_squared == pytest.approx(1 - error.flatten()[:200].mean().item(), abs=1e-5)
    assert 0.95 < r_squared < 1


def fake_fit(rows):
    """Stands in for the training: r(s, a) = s_0, both standardised."""
    assert rows.shape == (len(rows), 11 + 3 + 1)
    torch.testing.assert_close(rows.std(0), torch.ones(15), atol=0.05, rtol=0)
    return lambda x: x[..., 0]


@pytest.mark.parametrize("restored", [False, True])
def test_rewards_are_the_networks_and_all_else_is_kept(restored, pipeline, tmp_path, monkeypatch):
    """Terminals keep stage A's penalty, unless the buffer has none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(R, "fit_reward_proxy", fake_fit)
    old = R.read_buffer(pipeline / "buffer.npz")
    old.terminals[1, -1] = True
    old.metadata["restore_terminal_reward"] = restored
    R.write_buffer("buffer.npz", old)
    R.main(R.Args(device="cpu"))
    new = R.read_buffer("relabeled.npz")
    s_0 = []
    r = []
    for episode in R.load_episodes(R.open_datasets(HOPPER)):
        s_0 += episode.observations[:-1, 0].tolist()
        r += episode.rewards.tolist()
    expected = np.mean(r) + (old.observations[:, :-1, 0] - np.mean(s_0)) / np.std(s_0) * np.std(r)
    expected[old.terminals] -= 0 if restored else 100
    np.testing.assert_allclose(new.rewards, expected, rtol=1e-3)
    assert new.rewards.dtype == np.float32
    for key in set(R.Buffer._fields) - {"metadata", "rewards"}:
        np.testing.assert_array_equal(getattr(new, key), getattr(old, key))
    crc = R.checksum(x for x in old[1:] if x is not None)
    label = old.metadata["label"] + " + reward proxy"
    added = {"label": label, "reward_proxy_seed": 0, "buffer_crc": crc}
    assert new.metadata == {**old.metadata, **added}

    output = run(ROOT / "baselines" / "relabel_rewards.py", cwd=tmp_path).stdout
    assert output.splitlines()[-1] == "relabeled.npz is finished, made with these flags"
    for changes in ({"seed": 1}, {"out": "buffer.npz"}, {"out": __file__}):
        with pytest.raises(SystemExit, match="; choose another --out"):
            R.main(R.Args(**changes, device="cpu"))
    old.observations[0] += 1  # another buffer under the same name
    R.write_buffer("buffer.npz", old)
    with pytest.raises(SystemExit, match="relabeled.npz was made with buffer_crc .*--out"):
        R.main(R.Args(device="cpu"))


def test_what_cannot_work_ends_before_any_work(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(R, "fit_reward_proxy", None)  # would be a TypeError
    shutil.copy(pipeline / "buffer.npz", tmp_path)
    other = shutil.copytree(HOPPER, tmp_path / "hopper")
    with h5py.File(other / "data/main_data.hdf5", "r+") as file:
        file["episode_0/rewards"][0] += 1
    for changes, message in (
        ({"out": "/proc/b.npz"}, "/proc/b.npz cannot be written"),
        ({"env": str(other)}, "--aug buffer.npz was made from dataset_crc"),
        ({"env": ""}, "--env is empty"),
        ({"aug": ""}, "--aug is empty"),
        ({"out": ""}, "--out is empty"),
    ):
        with pytest.raises(SystemExit, match=message):
            R.main(R.Args(**changes, device="cpu"))
    assert not (tmp_path / "relabeled.npz").exists()
