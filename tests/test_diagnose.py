"""The two diagnostics, on data of which the answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from grad_norm_samples import true_norms
from torch import Tensor, nn

from fastsel import NeighborTable, cli, diagnose
from fastsel.compare import CompareError
from fastsel.data import load


def regression(rows: int = 400) -> tuple[nn.Module, Tensor, Tensor]:
    """A line, and targets that are off it at one end."""
    torch.manual_seed(0)
    x = torch.randn(rows, 3)
    model = nn.Linear(3, 1)
    target = model(x).detach() + 0.1 * torch.randn(rows, 1)
    target[x[:, 0] > 1] += 3
    return model, x, target


def test_gradient_norms_are_those_of_one_sample_each() -> None:
    model, x, target = regression(50)
    before = [p.grad for p in model.parameters()]
    found = diagnose.gradient_norms(model, nn.MSELoss(), x, target, batch_size=7)
    joined = torch.cat([x, target], 1)

    def loss(out: Tensor) -> Tensor:
        return out.mean()

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, both: Tensor) -> Tensor:
            return (self.model(both[:, :3]) - both[:, 3:]).square()  # type: ignore[no-any-return]

    expected = true_norms(Losses(), joined, loss)
    total = torch.stack(list(expected.values())).square().sum(0).sqrt()
    torch.testing.assert_close(found.double(), total, rtol=1e-5, atol=1e-7)
    assert [p.grad for p in model.parameters()] == before
    with pytest.raises(ValueError, match="of as many samples, and some, got 50 and 3"):
        diagnose.gradient_norms(model, nn.MSELoss(), x, target[:3])


def test_neighbours_of_a_region_that_is_not_learnt_are_suitable() -> None:
    model, x, target = regression()
    norms = diagnose.gradient_norms(model, nn.MSELoss(), x, target)
    table = NeighborTable.build(x, 8)
    found = diagnose.suitability(norms, table)
    order = norms.argsort(descending=True)[:32]
    around = norms[table.ids[order].long()]
    assert found.neighbor_norm == pytest.approx(float(around.mean()), rel=1e-5)
    assert found.mean_norm == pytest.approx(float(norms.mean()), rel=1e-5)
    assert found.ratio == pytest.approx(found.neighbor_norm / found.mean_norm)
    assert found.ratio_low < found.ratio < found.ratio_high
    assert found.pays
    assert found.verdict.startswith("Suitable: neighbours of the largest gradients have")
    assert f"{found.ratio:.2f} times" in found.verdict


def test_neighbours_without_anything_in_common_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = torch.rand(2000, generator=generator)
    table = torch.randint(2000, (2000, 16), generator=generator)
    found = diagnose.suitability(norms, table)
    assert not found.pays
    assert "no more than uniform samples" in found.verdict
    small = torch.where(norms > 0.98, norms, norms / 4)
    order = small.argsort()
    worse = diagnose.suitability(small, order[:16].expand(2000, 16))
    assert worse.ratio_high < 1
    assert "less than uniform samples" in worse.verdict


def test_smoothness_of_a_linear_model() -> None:
    # Of squared error the norm is 2 |y - w x| |(x, 1)|, which changes slowly with x.
    model, x, target = regression()
    norms = diagnose.gradient_norms(model, nn.MSELoss(), x, target)
    generator = torch.Generator().manual_seed(1)
    found = diagnose.smoothness(
        model, nn.MSELoss(), x, target, norms, neighbors=9, generator=generator
    )
    assert found.origin_norm == float(norms.max())
    assert found.norms[0] == pytest.approx(found.origin_norm, rel=1e-4)
    assert found.spreads[0] == pytest.approx(0, abs=1e-3 * found.origin_norm)
    origin = int(norms.argmax())
    away = (x - x[origin]).norm(dim=1).sort().values[1:10]
    torch.testing.assert_close(torch.tensor(found.neighbor_distances), away)
    assert found.distances[-1] == pytest.approx(2 * float(away[-1]), rel=1e-5)
    assert len(found.distances) == len(found.norms) == len(found.spreads) == 21
    assert found.is_smooth
    assert found.verdict.startswith("Smooth: gradient norms stay within a half")


def test_smoothness_of_a_model_that_wiggles() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            bump = torch.exp(-((x - 0.5) * 1e3).square().sum(1, keepdim=True))
            return self.last(bump)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x = torch.rand(300, 2)
    x[17] = 0.5
    model = Waves()
    nn.init.zeros_(model.last.bias)
    target = model(x).detach() + 1e-3
    target[17] += 1
    norms = diagnose.gradient_norms(model, nn.MSELoss(), x, target)
    found = diagnose.smoothness(
        model, nn.MSELoss(), x, target, norms, distances=[0.0, 0.001, 0.01, 0.1], neighbors=5
    )
    assert found.norms[0] == pytest.approx(found.origin_norm, rel=1e-4)
    assert not found.is_smooth
    assert found.verdict.startswith("Not smooth")


def test_images_keep_their_shape() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 4))
    x, target = torch.randn(40, 1, 6, 6), torch.randint(4, (40,))
    norms = diagnose.gradient_norms(model, nn.CrossEntropyLoss(), x, target)
    found = diagnose.smoothness(
        model, nn.CrossEntropyLoss(), x, target, norms, distances=[0, 1], samples=5, neighbors=3
    )
    assert found.norms[0] == pytest.approx(found.origin_norm, rel=1e-4)


def test_arguments() -> None:
    table = torch.zeros(5, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"norms must be \[5\], one for each sample .* got \[4\]"):
        diagnose.suitability(torch.ones(4), table)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite and not all zero"):
            diagnose.suitability(torch.tensor([1.0, wrong, 1, 1, 1]), table)
    with pytest.raises(ValueError, match="finite and not all zero"):
        diagnose.suitability(torch.zeros(5), table)
    model, x, target = regression(20)
    with pytest.raises(ValueError, match="more than 32, got 20, 20 and 20"):
        diagnose.smoothness(model, nn.MSELoss(), x, target, torch.ones(20))


# ---- a data set and a model ----


@pytest.mark.parametrize("model", ["linear", "auto"])
def test_a_diagnosis(tmp_path: Path, model: str) -> None:
    data = load("digits")
    seen: list[int] = []
    found = diagnose.diagnose(
        data,
        model=model,
        steps=20,
        points=4,
        rows=300,
        on_progress=lambda step, _: seen.append(step),
    )
    assert found.steps == (0, 5, 10, 15, 20) == tuple(seen)
    assert len(found.suitability) == 5
    assert (found.data, found.rows) == ("digits", 300)
    default = "small_cnn" if data.is_image else "mlp"
    assert found.model == (default if model == "auto" else model)
    again = diagnose.diagnose(data, model=model, steps=20, points=4, rows=300)
    assert again == found
    written = found.write(tmp_path / "out")
    assert [path.name for path in written] == [
        "diagnosis.json",
        "suitability.png",
        "smoothness.png",
    ]
    saved = json.loads(written[0].read_text())
    assert saved["verdict"] == found.verdict
    assert len(saved["suitability"]) == 5
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["diagnose", "digits", "--steps", "10", "--rows", "200", "--model", "linear"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "step     10: mean gradient norm" in out
    assert "uitable: neighbours of the largest gradients have" in out
    assert out.count("Written: ") == 3
    assert cli.main([*arguments, "--neighbors", "300"]) == 2
    error = capsys.readouterr().err
    assert error == ("fastsel diagnose: there must be more rows than neighbors, got 200 and 300\n")
    assert cli.main(["diagnose", "nothing.csv", "--target", "a"]) == 2
    assert "fastsel diagnose: no such file: nothing.csv" in capsys.readouterr().err


def test_wrong_options() -> None:
    data = load("digits")
    with pytest.raises(CompareError, match=r"model must be auto or one of linear, .*, got gpt"):
        diagnose.diagnose(data, model="gpt")
    with pytest.raises(CompareError, match="steps must be positive, got 0"):
        diagnose.diagnose(data, steps=0)
