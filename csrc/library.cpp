// Every op of fastsel, one line each: the contract. Semantics are in docs/ and in fastsel/ops.py.
#include "torch_api.h"

STABLE_TORCH_LIBRARY(FASTSEL_NAMESPACE, m) {
  m.def(
      "sample_scores(Tensor logits, Tensor target, *, int ignore_index=-100) -> (Tensor loss, "
      "Tensor grad_norm, Tensor entropy, Tensor lse)");
  m.def(
      "sample_scores_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor loss, Tensor "
      "lse, *, int ignore_index=-100) -> Tensor");
  m.def(
      "topk(Tensor scores, SymInt k, *, bool largest=True, bool sorted=True) -> (Tensor values, "
      "Tensor indices)");
}
