"""The demo and its tasks: the same data for everyone, two runs that agree, and what is written about them."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from lrkernels import demo, schedules, tasks
from lrkernels.__main__ import main


@pytest.fixture(scope="module")
def digits():
    return tasks.digits(seed=3)


@pytest.fixture(scope="module")
def text():
    return tasks.text(seed=3, batch_size=4, context=16, width=32, layers=1)


@pytest.mark.parametrize("name", ["digits", "text"])
def test_a_task_is_the_same_at_every_call(name, request):
    task = request.getfixturevalue(name)
    before = torch.get_rng_state()
    first, second = task.model(), task.model()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(task.batches(3), task.batches(3), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    other = getattr(tasks, name)(seed=4)
    assert not torch.equal(next(other.batches(1))[1], next(task.batches(1))[1])
    assert task.evaluate(first.train()) == task.evaluate(second.eval())
    assert first.training and not second.training
    assert torch.equal(before, torch.get_rng_state())


def test_digits_are_split_and_shuffled():
    task = tasks.digits(seed=0, batch_size=479)
    epoch = list(task.batches(3))  # 1437 images to train on
    images = torch.cat([inputs for inputs, _ in epoch]).flatten(1)
    assert images.shape == (1437, 64) and len(images.unique(dim=0)) == 1437
    assert images.min() == -1 and images.max() == 1
    assert torch.cat([labels for _, labels in epoch]).bincount().min() > 120
    assert task.evaluate(task.model()) < 0.3


def test_text_targets_are_the_next_bytes(text):
    inputs, targets = next(text.batches(1))
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    model = text.model()
    assert text.loss(model, (inputs, targets)).item() == pytest.approx(math.log(256), abs=0.5)
    changed = inputs.clone()
    changed[:, 8:] = 0  # a prediction must not see later bytes
    assert torch.allclose(model(inputs)[:, :8], model(changed)[:, :8], atol=1e-6)
    assert not torch.allclose(model(inputs)[:, 8:], model(changed)[:, 8:], atol=1e-2)


def test_the_library_is_split_without_overlap():
    train, held_out = tasks._standard_library(size=500_000)
    assert (len(train), len(held_out)) == (450_000, 50_000)
    assert b"import" in bytes(train.tolist()) and b"import" in bytes(held_out.tolist())


def test_eager_watches_before_it_clips():
    point = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = demo.EagerSGD([point], lr=0.5, schedule=lambda step: 1 / (step + 1))
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([-4.0, 3.0]), torch.tensor([0.0, 0.5])]
    for gradient in gradients:
        point.grad = gradient.clone()
        optimizer.step()
    history = optimizer.history()
    assert history["lr"] == pytest.approx([0.5, 0.25, 0.5 / 3])
    assert history["grad_norm"] == pytest.approx([5, 5, 0.5])
    assert history["alignment"] == pytest.approx([0, 0, 1.5])
    assert history["cosine"] == pytest.approx([0, 0, 0.6])


@pytest.mark.parametrize("name", ["digits", "text"])
def test_both_runs_do_the_same(name, request):
    result = demo.compare(request.getfixturevalue(name), steps=12)
    ours, theirs = result.fused.history(), result.eager.history()
    assert ours["lr"] == pytest.approx([result.task.lr * schedules.linear(12)(step) for step in range(12)], rel=1e-6)
    for key in ("lr", "grad_norm", "alignment", "cosine", "loss"):
        assert len(ours[key]) == 12
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-5, err_msg=key)
    for p, q in zip(result.fused.model.parameters(), result.eager.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert result.agrees and result.metrics[0] == pytest.approx(result.metrics[1], abs=1e-4)
    assert ours["loss"][-1] < ours["loss"][0]
    assert "agree" in str(result) and "12" in str(result)


def test_the_command_prints_and_writes(tmp_path, capsys):
    assert main(["demo", "--task", "digits", "--steps", "12", "--seed", "1", "--out", str(tmp_path / "new")]) == 0
    captured = capsys.readouterr()
    for words in ("25,866 parameters in 8 tensors", "test accuracy", "optimizer alone", "whole training", " x\n"):
        assert words in captured.out
    assert captured.err.splitlines() == [f"digits: step {step} of 12" for step in (3, 6, 9, 12)]

    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["demo.png", "digits.npz"]
    with np.load(tmp_path / "new" / "digits.npz") as history:
        assert {"lr", "grad_norm", "alignment", "cosine", "loss"} <= set(history)
        assert history["loss"].shape == (12,) and np.isfinite(history["loss"]).all()
    import matplotlib.image

    image = matplotlib.image.imread(tmp_path / "new" / "demo.png")[..., :3]
    orange = (np.abs(image - [0xF2 / 255, 0xA6 / 255, 0x5A / 255]) < 0.05).all(-1)
    for panel in np.array_split(orange, 4):  # rate, norm, alignment and loss all have their line
        assert panel.sum() > 300


def test_disagreement_is_said_and_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "AGREEMENT", -1.0)
    assert main(["demo", "--task", "digits", "--steps", "2", "--out", str(tmp_path)]) == 1
    assert "DISAGREE" in capsys.readouterr().out
