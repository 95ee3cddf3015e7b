"""baselines/relabel_rewards.py: the reward proxy of E.7, and what it does to a buffer."""

import json

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
    assert R.fit_reward_proxy(torch.column_stack([sa, torch.randn(4000)]), 600)[1] < 0.1
    proxy, r_squared = R.fit_reward_proxy(torch.column_stack([sa, known]), 1500)
    assert 0.95 < r_squared < 1
    assert (proxy(sa.view(40, 100, 4)) - known.view(40, 100)).square().mean() < 0.05


@pytest.mark.parametrize("restored", [False, True])
def test_rewards_are_the_networks_and_all_else_is_kept(restored, pipeline, tmp_path, monkeypatch):
    """The network is r(s, a) = s_0 here, both standardised; terminals keep stage A's penalty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(R, "fit_reward_proxy", lambda rows: (lambda x: x[..., 0], 0.9))
    old, metadata = R.read_buffer(pipeline / "buffer.npz")
    old["terminals"][1, -1], metadata["restore_terminal_reward"] = True, restored
    np.savez("buffer.npz", **old, metadata=json.dumps(metadata))
    R.main(R.Args())
    new, own = R.read_buffer("relabeled.npz")
    (dataset,) = R.open_datasets(HOPPER)
    s_0, r = np.concatenate([*R.read_transitions(dataset)])[:, [0, -1]].T
    expected = r.mean() + (old["observations"][:, :-1, 0] - s_0.mean()) / s_0.std() * r.std()
    expected[old["terminals"]] -= 0 if restored else 100
    np.testing.assert_allclose(new["rewards"], expected, rtol=1e-3)
    for key in old.keys() - {"rewards"}:
        np.testing.assert_array_equal(new[key], old[key])
    metadata |= {"label": metadata["label"] + " + reward proxy", "reward_proxy_seed": 0}
    assert own == metadata and new.keys() == old.keys() and new["rewards"].dtype == np.float32

    output = run(ROOT / "baselines" / "relabel_rewards.py", cwd=tmp_path).stdout
    assert output == "relabeled.npz is finished, made with these flags\n"
    for changes in ({"seed": 1}, {"out": "buffer.npz"}, {"out": __file__}):
        with pytest.raises(SystemExit, match="; choose another --out"):
            R.main(R.Args(**changes))
