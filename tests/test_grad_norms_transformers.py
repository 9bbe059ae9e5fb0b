"""`GradNorms` on the models of Hugging Face Transformers, as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grad_norm_samples import mean_loss, true_norms
from torch import Tensor, nn

from fastsel.grad_norms import GradNorms

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Logits(nn.Module):
    """A model's logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits  # type: ignore[no-any-return]


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=60)
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    config = transformers.BertConfig(**SMALL, **NO_DROPOUT, vocab_size=60)
    return transformers.BertForSequenceClassification(config)


def vit() -> Any:
    config = transformers.ViTConfig(**SMALL, **NO_DROPOUT, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("make", [gpt2, llama, bert, vit])
def test_exact(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = Logits(make())
    x = torch.randn(4, 3, 32, 32) if make is vit else torch.randint(0, 60, (4, 20))
    expected = true_norms(model, x)
    norms = GradNorms(model)
    with norms:
        mean_loss(model(x)).backward()
    found = norms.norms_by_parameter
    # Biases of keys have no gradient but rounding.
    size = float(norms.norms.max())
    for name, values in expected.items():
        if name not in found:
            assert not values.any(), name
            continue
        torch.testing.assert_close(
            found[name].double(), values, rtol=1e-5, atol=1e-6 * size, msg=name
        )
