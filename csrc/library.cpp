// Every op of fastsel, one line each: the contract. Semantics are in docs/ and in fastsel/ops.
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
  m.def(
      "adaselection_(Tensor losses, Tensor? grad_norms, Tensor? reference_losses, int[] methods, "
      "Tensor(a!) method_weights, Tensor(b!) method_losses, Tensor(c!) step, SymInt k, float beta, "
      "float curriculum_power, bool standardize=True, *, Tensor? statistics=None, Tensor(d!)? "
      "excluded=None) -> (Tensor indices, Tensor scores)");
}
