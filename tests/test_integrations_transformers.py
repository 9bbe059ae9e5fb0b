"""`SelectiveTrainer`: which rows a model trains on, and what the Trainer keeps doing by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
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
    largest_losses,
    network,
    run_ranks,
    samples,
    sgd_steps,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers_samples import (
    VOCABULARY,
    Classifier,
    Rows,
    T,
    arguments,
    causal_model,
    classes,
    gpt2,
    token_losses,
    tokens,
    trainer,
    training_rows,
)

from fastsel.integrations.transformers import SelectiveTrainerMixin
from fastsel.select import AdaSelection, CostAwareSwitch, ImportanceSampling, LossMemory, Uniform


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Precision and accumulation are kept for the whole process otherwise."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_it_trains_on_the_chosen_samples_alone(folder: Path) -> None:
    model, expected = Classifier(), network()
    inputs, target = samples(3)
    trainer(folder, model, classes(3)).train()
    for start in range(0, 3 * B, B):
        rows = start + largest_losses(expected(inputs[start:][:B]), target[start:][:B])
        sgd_steps(expected, [(inputs[rows], target[rows])])
    assert model.sizes == [K] * 3
    assert_same_weights(model.net, expected)


def test_a_plain_switch_leaves_the_trainer_as_it_is(folder: Path) -> None:
    model, expected = Classifier(), Classifier()
    trainer(folder, model, classes(3), switch="plain").train()
    Trainer(expected, arguments(folder), train_dataset=classes(3)).train()
    assert model.sizes == [B] * 3
    assert_same_weights(model, expected)


def test_plain_and_selective_steps_alternate_as_the_switch_wants(folder: Path) -> None:
    model = Classifier()
    switch = ScriptedSwitch([PLAIN, SELECT, MEASURED_PLAIN, MEASURED_SELECT])
    trainer(folder, model, classes(5), switch=switch).train()
    assert model.sizes == [B, K, B, K, K]
    assert [seen.plan.select for seen in switch.observed] == [False, True, False, True, True]
    assert all(seen.seconds is not None and seen.seconds > 0 for seen in switch.observed[:3])
    # Only the steps that measured know the share; of four of sixteen it is more than a quarter.
    known = [0.25 < seen.share < 1.0 for seen in switch.observed]
    assert known == [False, False, True, True, True]


def test_the_switch_of_its_own_accord_tries_both_kinds_of_steps_and_decides(folder: Path) -> None:
    model = Classifier()
    made = trainer(folder, model, classes(40), switch=CostAwareSwitch(overhead=1.0))
    made.train()
    assert set(model.sizes) == {B, K}
    assert made.selection.switch.decisions


@pytest.mark.parametrize("plan", [MEASURED_PLAIN, MEASURED_SELECT])
def test_the_share_is_that_of_the_gradient_norms(folder: Path, plan: Any) -> None:
    model, switch = Classifier(), ScriptedSwitch([plan])
    inputs, target = samples()
    logits = model.net(inputs).detach()
    norms = (logits.softmax(1) - F.one_hot(target, logits.shape[1])).norm(dim=1)
    expected = norms[largest_losses(logits, target)].sum() / norms.sum()
    trainer(folder, model, classes(), switch=switch).train()
    # float32, and another order of additions
    assert switch.observed[0].share == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("selector", ["big_loss", "grad_norm", "entropy"])
def test_causal_models_are_scored_by_their_next_tokens(folder: Path, selector: str) -> None:
    model, data = causal_model(), tokens()
    inputs, labels = dict(data.columns), data.columns["labels"][:, 1:]
    inputs.pop("labels")
    logits = model(**inputs).logits[:, :-1].detach()  # [B, T-1, V]
    kept = labels != -100
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    onehot = F.one_hot(labels.clamp(min=0), VOCABULARY)
    norm = (logits.softmax(2) - onehot).norm(dim=2) * kept
    entropy = torch.special.entr(logits.softmax(2)).sum(2) * kept
    expected = {
        "big_loss": loss.sum(1) / kept.sum(1),
        "grad_norm": norm.norm(dim=1) / kept.sum(1),
        "entropy": entropy.sum(1) / kept.sum(1),
    }[selector]
    rows = expected.topk(K).indices.sort().values
    manual = causal_model()
    torch.autograd.backward(
        manual(**{name: part[rows] for name, part in data.columns.items()}).loss
    )
    torch.optim.SGD(manual.parameters(), lr=0.1).step()
    trainer(folder, model, data, selector).train()
    # The Trainer divides the summed loss by the number of tokens, the model takes the mean.
    assert_same_weights(model, manual, bits=False)


def test_a_causal_model_whose_loss_names_no_type_is_known_by_its_class(folder: Path) -> None:
    model, data = gpt2(), tokens()
    rows = token_losses(model, data.columns).topk(K).indices.sort().values
    seen = training_rows(model)
    trainer(folder, model, data).train()
    assert torch.equal(seen[0], data.columns["input_ids"][rows])


def test_accumulated_causal_batches_keep_the_weight_of_their_tokens(folder: Path) -> None:
    model, manual, data = causal_model(), causal_model(), tokens(2 * B)
    batches = [{name: part[i : i + B] for name, part in data.columns.items()} for i in (0, B)]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    assert counts[0] != counts[1]
    for batch, count in zip(batches, counts, strict=True):
        rows = token_losses(manual, batch).topk(K).indices.sort().values
        chosen = {name: part[rows] for name, part in batch.items()}
        torch.autograd.backward(manual(**chosen).loss * count / sum(counts))
    torch.optim.SGD(manual.parameters(), lr=0.1).step()
    trainer(folder, model, data, gradient_accumulation_steps=2).train()
    assert_same_weights(model, manual, bits=False)  # other orders of additions


def test_token_classifiers_are_scored_by_the_tokens_as_they_are(folder: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=T, num_labels=VOCABULARY,
    )  # fmt: skip
    torch.manual_seed(1)
    model, data = transformers.BertForTokenClassification(config), tokens()
    inputs = {name: part for name, part in data.columns.items() if name != "labels"}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    labels = data.columns["labels"]
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    rows = (loss / (labels != -100).sum(1)).topk(K).indices.sort().values
    seen = training_rows(model)
    trainer(folder, model, data).train()
    assert torch.equal(seen[0], data.columns["input_ids"][rows])


def test_encoder_decoders_and_another_trainer_class(folder: Path) -> None:
    class MyTrainer(SelectiveTrainerMixin, transformers.Seq2SeqTrainer):
        pass

    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=8, encoder_layers=1, decoder_layers=1, dropout=0.0,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.BartForConditionalGeneration(config)
    data = tokens()
    with torch.no_grad():
        logits = model.eval()(**data.columns).logits
    labels = data.columns["labels"]
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    rows = (loss / (labels != -100).sum(1)).topk(K).indices.sort().values
    seen = training_rows(model)
    train_args = transformers.Seq2SeqTrainingArguments(
        str(folder), per_device_train_batch_size=B, num_train_epochs=1, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    MyTrainer(
        model, train_args, train_dataset=data, selector="big_loss", rate=RATE, switch="select"
    ).train()
    assert torch.equal(seen[0], data.columns["input_ids"][rows])


def test_gradients_accumulate_over_chosen_samples(folder: Path) -> None:
    model, expected = Classifier(), network()
    inputs, target = samples(2)
    trainer(folder, model, classes(2), gradient_accumulation_steps=2).train()
    group = []
    for start in (0, B):
        rows = start + largest_losses(expected(inputs[start:][:B]), target[start:][:B])
        group.append((inputs[rows], target[rows]))
    sgd_steps(expected, [group])
    assert_same_weights(model.net, expected)


def test_in_mixed_precision_it_trains_on_the_chosen_samples(folder: Path) -> None:
    model, expected = Classifier(), Classifier()
    inputs, target = samples()
    with torch.autocast("cpu", torch.bfloat16):
        rows = largest_losses(expected.net(inputs), target)
    trainer(folder, model, classes(), bf16=True).train()
    chosen = Rows(x=inputs[rows], labels=target[rows])
    Trainer(expected, arguments(folder, bf16=True), train_dataset=chosen).train()
    assert_same_weights(model, expected)


def test_a_criterion_and_labels_of_ones_own(folder: Path) -> None:
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.batches: list[Tensor] = []

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            output = self.net(x)
            if labels is None:
                return {"logits": output}
            self.batches.append(x)
            return {"loss": F.mse_loss(output, labels), "logits": output}

    inputs, target = samples()
    data = Rows(x=inputs, labels=F.one_hot(target).float())
    model = Regression()
    loss = (model.net(inputs) - data.columns["labels"]).square().mean(1)
    trainer(folder, model, data, criterion=nn.MSELoss()).train()
    assert torch.equal(model.batches[0], inputs[loss.topk(K).indices.sort().values])
    with pytest.raises(ValueError, match=r"given for labels of torch\.float32"):
        trainer(folder, Regression(), data).train()


def test_ids_reach_the_memory_and_not_the_model(folder: Path) -> None:
    inputs, target = samples()
    data = Rows(x=inputs, labels=target, row=torch.arange(B))
    memory, model = LossMemory(B), Classifier()
    chosen = largest_losses(model.net(inputs), target)
    losses = F.cross_entropy(model.net(inputs), target, reduction="none").detach()
    options = {"memory": memory, "scoring_every": 1}
    made = trainer(folder, model, data, ids_key="row", selection_options=options, eval_dataset=data)
    made.train()
    assert memory.losses.isfinite().nonzero().flatten().tolist() == chosen.tolist()
    # The memory's losses are those of the training forward, whose rows torch may add up otherwise.
    torch.testing.assert_close(memory.losses[chosen], losses[chosen], rtol=1e-5, atol=1e-6)
    assert made.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="a batch must have the ids_key 'row', got x, labels"):
        trainer(folder, model, classes(), ids_key="row").train()


def test_a_scoring_model(folder: Path) -> None:
    model, scoring = Classifier(), Classifier()
    with torch.no_grad():
        scoring.net[2].weight.neg_()  # type: ignore[operator]
    inputs, target = samples()
    rows = largest_losses(scoring.net(inputs), target)
    trainer(folder, model, classes(), selection_options={"scoring_model": scoring}).train()
    assert torch.equal(model.batches[0], inputs[rows])


def test_figures_are_logged_beside_the_training_loss(folder: Path) -> None:
    switch = ScriptedSwitch([PLAIN, SELECT])
    made = trainer(
        folder, Classifier(), classes(4), "adaselection", switch=switch, logging_steps=4,
        eval_dataset=classes(), eval_strategy="epoch",
    )  # fmt: skip
    made.train()
    (logged,) = [entry for entry in made.state.log_history if "loss" in entry]
    assert logged["fastsel/chosen"] == pytest.approx((1 + 3 * RATE) / 4)
    assert logged["fastsel/selecting"] == pytest.approx(3 / 4)
    weights = made.selection.selector.weights  # type: ignore[attr-defined]
    assert {name: logged[f"fastsel/weight/{name}"] for name in weights} == weights
    others = [entry for entry in made.state.log_history if "loss" not in entry]
    assert others
    assert not any(name.startswith("fastsel") for entry in others for name in entry)


def adaptive() -> dict[str, Any]:
    selector = AdaSelection(("big_loss", "small_loss", "uniform"), rate=RATE)
    options = {"memory": LossMemory(4 * B), "scoring_every": 2}
    return {"selector": selector, "selection_options": options}


def drawing() -> dict[str, Any]:
    return {"selector": Uniform(RATE, generator=torch.Generator().manual_seed(5))}


@pytest.mark.parametrize("make", [adaptive, drawing])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(make: Any, folder: Path) -> None:
    inputs, target = samples(4)
    data = Rows(x=inputs, labels=target, row=torch.arange(4 * B))
    saving = {"save_strategy": "steps", "save_steps": 2, "ids_key": "row"}
    whole, resumed = Classifier(), Classifier()
    trainer(folder, whole, data, **make(), **saving).train()
    again = trainer(folder, resumed, data, **make(), **saving)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert len(resumed.batches) == 2
    assert_same_weights(resumed, whole)
    for one, other in zip(resumed.batches, whole.batches[2:], strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_without_a_state_is_told_and_one_of_another_selector_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    Trainer(Classifier(), arguments(folder, **saving), train_dataset=classes(2)).train()
    checkpoint = str(folder / "checkpoint-1")
    trainer(folder, Classifier(), classes(2)).train(resume_from_checkpoint=checkpoint)
    assert "fastsel_0.pt, so the selection starts anew" in caplog.text
    trainer(folder, Classifier(), classes(2), **saving).train()
    with pytest.raises(ValueError, match="'small_loss', got that of 'big_loss'"):
        trainer(folder, Classifier(), classes(2), "small_loss").train(
            resume_from_checkpoint=checkpoint
        )


def test_training_improves(folder: Path) -> None:
    inputs, target = samples(20)
    model = Classifier()
    before = float(F.cross_entropy(model.net(inputs), target).detach())
    trainer(folder, model, classes(20), "big_loss", 0.5, num_train_epochs=10).train()
    assert float(F.cross_entropy(model.net(inputs), target).detach()) < before / 2


def test_two_ranks(folder: Path) -> None:
    """The script checks what each rank trained on; see there."""
    alone = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(folder / "one", Classifier(), classes(3), switch=CostAwareSwitch(), **alone).train()
    run_ranks("ddp_transformers.py", folder, folder / "one" / "checkpoint-2")


def test_bad_arguments_and_batches_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="'importance' gives weights, which the framework's own"):
        trainer(folder, Classifier(), classes(), ImportanceSampling(RATE))
    with pytest.raises(TypeError, match="no_such_option"):
        trainer(folder, Classifier(), classes(), selection_options={"no_such_option": 1})
    with pytest.raises(ValueError, match=r"one tensor of labels \(label_names\), got \[\] among x"):
        trainer(folder, Classifier(), Rows(x=samples()[0])).train()

    class Bare(Classifier):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            return (self.net(x),)

    with pytest.raises(TypeError, match="output must have logits, got tuple"):
        trainer(folder, Bare(), classes()).train()
