"""`SelectiveCallback`: which rows a LightningModule trains on, and what it logs."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from integration_samples import (
    MEASURED_PLAIN,
    MEASURED_SELECT,
    PLAIN,
    RATE,
    SELECT,
    B,
    K,
    ScriptedSwitch,
    assert_same_weights,
    backward_of,
    largest_losses,
    network,
    run_ranks,
    samples,
    sgd_steps,
)
from lightning_samples import Module, Rows, callback, fit, loader
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastsel.select import CostAwareSwitch, LossMemory, ReferenceLosses


def test_it_trains_on_the_chosen_samples_alone() -> None:
    module, expected = Module(), network()
    inputs, target = samples(3)
    fit(module, loader(3), callback())
    for start in range(0, 3 * B, B):
        rows = start + largest_losses(expected(inputs[start:][:B]), target[start:][:B])
        sgd_steps(expected, [(inputs[rows], target[rows])])
    assert module.sizes == [K] * 3
    assert_same_weights(module.net, expected)


def test_a_plain_switch_leaves_the_fit_as_it_is() -> None:
    module, expected = Module(), Module()
    fit(module, loader(3), callback(switch="plain"))
    fit(expected, loader(3))
    assert module.sizes == [B] * 3
    assert_same_weights(module, expected)


def test_plain_and_selective_steps_alternate_as_the_switch_wants() -> None:
    module = Module()
    switch = ScriptedSwitch([PLAIN, SELECT, MEASURED_PLAIN, MEASURED_SELECT])
    fit(module, loader(5), callback(switch=switch))
    assert module.sizes == [B, K, B, K, K]
    assert [seen.plan.select for seen in switch.observed] == [False, True, False, True, True]
    assert all(seen.seconds is not None and seen.seconds > 0 for seen in switch.observed[:3])
    # Only the steps that measured know the share; of four of sixteen it is more than a quarter.
    known = [0.25 < seen.share < 1.0 for seen in switch.observed]
    assert known == [False, False, True, True, True]


def test_the_switch_of_its_own_accord_tries_both_kinds_of_steps_and_decides() -> None:
    switch = CostAwareSwitch(overhead=1.0)  # which looks at every fourth plain step
    module, selective = Module(), callback(switch=switch)
    fit(module, loader(40), selective)
    assert set(module.sizes) == {B, K}
    assert selective.selection.switch.decisions
    assert selective.selection.switch.cost is not None


@pytest.mark.parametrize("plan", [MEASURED_PLAIN, MEASURED_SELECT])
def test_the_share_is_that_of_the_gradient_norms(plan: Any) -> None:
    module, switch = Module(), ScriptedSwitch([plan])
    inputs, target = samples()
    logits = module(inputs).detach()
    probability = logits.softmax(1) - F.one_hot(target, logits.shape[1])
    norms = probability.norm(dim=1)
    expected = norms[largest_losses(logits, target)].sum() / norms.sum()
    fit(module, loader(), callback(switch=switch))
    # float32, and another order of additions
    assert switch.observed[0].share == pytest.approx(float(expected), rel=1e-5)


def test_a_training_step_that_goes_around_forward_is_measured_by_a_forward_of_its_own() -> None:
    shares = []
    for calls_forward in (True, False):
        switch = ScriptedSwitch([MEASURED_PLAIN])
        fit(Module(calls_forward=calls_forward), loader(2), callback(switch=switch))
        shares.append([seen.share for seen in switch.observed])
    assert shares[0] == shares[1]


def test_dict_batches_with_ids_texts_and_constants() -> None:
    inputs, target = samples()
    rows = [
        {"x": inputs[i], "y": target[i], "row": i, "name": f"row {i}", "deep": (inputs[i], [i])}
        for i in range(B)
    ]
    memory = LossMemory(B)
    module = Module()
    selective = callback(
        batch_to_inputs_and_target=lambda batch: (batch["x"], batch["y"]),
        ids_key="row",
        memory=memory,
        scoring_every=1,
    )
    chosen = largest_losses(module(inputs), target)
    losses = F.cross_entropy(module(inputs), target, reduction="none").detach()
    fit(module, DataLoader(Rows(rows), batch_size=B), selective)
    (batch,) = module.batches
    assert batch["row"].tolist() == chosen.tolist()
    assert batch["name"] == [f"row {i}" for i in chosen]
    assert torch.equal(batch["deep"][0], inputs[chosen])
    assert torch.equal(batch["deep"][1][0], chosen)
    assert memory.losses.isfinite().nonzero().flatten().tolist() == chosen.tolist()
    # The memory's losses are those of the training forward, whose rows torch may add up otherwise.
    torch.testing.assert_close(memory.losses[chosen], losses[chosen], rtol=1e-5, atol=1e-6)


def test_named_tuples_keep_their_type_and_ids_may_be_an_index() -> None:
    kind = namedtuple("kind", "x y row")
    inputs, target = samples()
    rows = [kind(inputs[i], target[i], i) for i in range(B)]
    module = Module()
    reference = ReferenceLosses(torch.arange(B, dtype=torch.float32))
    selective = callback("rho_loss", ids_key=2, reference=reference)
    excess = F.cross_entropy(module(inputs), target, reduction="none") - torch.arange(B)
    fit(module, DataLoader(Rows(rows), batch_size=B), selective)
    (batch,) = module.batches
    assert type(batch) is kind
    assert batch.row.tolist() == excess.topk(K).indices.sort().values.tolist()


def test_batches_of_other_types_are_taken_by_a_function() -> None:
    class Pair:
        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.x, self.y = x, y

    class PairModule(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch.x, batch.y), batch_idx)

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch

    data = DataLoader(TensorDataset(*samples()), B, collate_fn=lambda _: Pair(*samples()))
    both = {"batch_to_inputs_and_target": lambda pair: (pair.x, pair.y)}
    module = PairModule()
    take = {"take": lambda pair, rows: Pair(pair.x[rows], pair.y[rows])}
    fit(module, data, callback(**both, **take))
    assert module.sizes == [K]
    with pytest.raises(TypeError, match=r"take_rows: batch must be made of tensors.*got Pair"):
        fit(PairModule(), data, callback(**both))


def test_gradients_accumulate_over_chosen_samples() -> None:
    module, expected = Module(), network()
    inputs, target = samples(2)
    fit(module, loader(2), callback(), accumulate_grad_batches=2)
    group = []
    for start in (0, B):
        rows = start + largest_losses(expected(inputs[start:][:B]), target[start:][:B])
        group.append((inputs[rows], target[rows]))
    sgd_steps(expected, [group])
    assert_same_weights(module.net, expected)


def test_in_mixed_precision_every_weight_gets_its_gradient() -> None:
    module, expected = Module(), network()
    inputs, target = samples()
    seen: list[Tensor] = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            seen.extend(parameter.grad.clone() for parameter in module.parameters())

    fit(module, loader(), callback(), Watch(), precision="bf16-mixed")
    with torch.autocast("cpu", torch.bfloat16):
        logits = expected(inputs)
    rows = largest_losses(logits, target)
    backward_of(expected, [(inputs[rows], target[rows])], autocast=True)
    for grad, parameter in zip(seen, expected.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(grad, parameter.grad)


def test_manual_optimization() -> None:
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module, expected = Manual(), Module()
    fit(module, loader(3), callback())
    fit(expected, loader(3), callback())
    assert_same_weights(module, expected)
    with pytest.raises(ValueError, match=r"across_ranks scales the loss.*automatic optimization"):
        fit(Manual(), loader(), callback(across_ranks=True))


def test_an_optimizer_with_a_closure_sees_one_choice() -> None:
    class Closures(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)

    module = Closures()
    fit(module, loader(), callback("uniform"))
    assert len(module.batches) > 1
    for batch in module.batches:
        assert torch.equal(batch[0], module.batches[0][0])


def test_a_compiled_module_trains_on_the_chosen_samples() -> None:
    class Silent(Module):  # torch.compile cannot trace Lightning's log
        def log(self, *args: Any, **kwargs: Any) -> None:
            pass

    # The eager backend runs torch.compile's tracing without its code generation.
    module, expected = Silent(), Silent()
    switch = ScriptedSwitch([SELECT, MEASURED_PLAIN, SELECT])
    fit(torch.compile(module, backend="eager"), loader(3), callback(switch=switch))
    switch = ScriptedSwitch([SELECT, MEASURED_PLAIN, SELECT])
    fit(expected, loader(3), callback(switch=switch))
    assert_same_weights(module, expected)


def test_figures_are_logged() -> None:
    selective = callback("adaselection", switch=ScriptedSwitch([PLAIN, SELECT]))
    made = fit(Module(), loader(4), selective, log_every_n_steps=4)
    logged = {name: float(value) for name, value in made.callback_metrics.items()}
    assert logged["fastsel/chosen"] == pytest.approx((1 + 3 * RATE) / 4)
    assert logged["fastsel/selecting"] == pytest.approx(3 / 4)
    weights = selective.selection.selector.weights  # type: ignore[attr-defined]
    assert len(weights) > 1
    for name, weight in weights.items():
        assert logged[f"fastsel/weight/{name}"] == pytest.approx(weight)
    silent = fit(Module(), loader(), callback(log=False))
    assert not any(name.startswith("fastsel") for name in silent.callback_metrics)


def test_training_improves() -> None:
    inputs, target = samples(20)
    module = Module()
    before = float(F.cross_entropy(module(inputs), target).detach())
    fit(module, loader(20), callback("big_loss", 0.5), max_epochs=10)
    assert float(F.cross_entropy(module(inputs), target).detach()) < before / 2


def test_a_trainer_of_the_other_package_takes_it() -> None:
    class Other(pytorch_lightning.LightningModule):
        forward, training_step = Module.forward, Module.training_step
        configure_optimizers = Module.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls_forward = network(), True
            self.batches: list[Any] = []

    module, expected = Other(), Module()
    fit(module, loader(2), callback(), flavour=pytorch_lightning)
    fit(expected, loader(2), callback())
    assert_same_weights(module, expected)


def test_two_ranks(tmp_path: Path) -> None:
    """The script checks what each rank trained on; see there."""
    run_ranks("ddp_lightning.py", tmp_path)
