"""What the tests of the transformers adapter share: data sets, small models and trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from integration_samples import RATE, B, network, samples
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import TrainingArguments

from fastsel.integrations.transformers import SelectiveTrainer
from fastsel.select.selector import Selector

T, VOCABULARY = 7, 11


class Rows(Dataset[dict[str, Tensor]]):
    """Columns of one length as a data set of dicts."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self.columns.items()}


class Classifier(nn.Module):
    """A classifier as the Trainer likes them, which keeps what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        if self.training:
            self.batches.append(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    @property
    def sizes(self) -> list[int]:
        """How many samples each training forward had."""
        return [len(batch) for batch in self.batches]


def classes(batches: int = 1) -> Rows:
    inputs, target = samples(batches)
    return Rows(x=inputs, labels=target)


def tokens(count: int = B) -> Rows:
    """Token rows of different lengths: padding is not to be learnt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (count, T), generator=generator)
    length = torch.randint(3, T + 1, (count, 1), generator=generator)
    mask = (torch.arange(T) < length).long()
    return Rows(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


def causal_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=T, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=T, n_embd=8, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def training_rows(model: nn.Module) -> list[Tensor]:
    """The token rows that the model is going to be trained on."""
    seen: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]) if module.training else None,
        with_kwargs=True,
    )
    return seen


def token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of each row's counted next tokens ``[B]``."""
    inputs = {name: part for name, part in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return loss.sum(1) / (labels != -100).sum(1)


def arguments(folder: Path, **kwargs: Any) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": B, "num_train_epochs": 1, "learning_rate": 0.1,
        "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "train_sampling_strategy": "sequential", "seed": 3,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**defaults, **kwargs})


def trainer(
    folder: Path, model: Any, data: Any, selector: Any = "big_loss", rate: Any = RATE, **kwargs: Any
) -> SelectiveTrainer:
    of_the_trainer = {
        name: kwargs.pop(name)
        for name in ("switch", "criterion", "ids_key", "selection_options", "kind", "eval_dataset")
        if name in kwargs
    }
    kind = of_the_trainer.pop("kind", SelectiveTrainer)
    made: SelectiveTrainer = kind(
        model,
        arguments(folder, **kwargs),
        train_dataset=data,
        selector=selector,
        rate=None if isinstance(selector, Selector) else rate,
        **{"switch": "select", **of_the_trainer},
    )
    return made
