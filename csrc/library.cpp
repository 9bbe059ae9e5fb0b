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
  m.def(
      "linear_grad_norm_sq(Tensor activations, Tensor grad_outputs, *, str form=\"auto\") -> "
      "Tensor");
  m.def(
      "conv_grad_norm_sq(Tensor input, Tensor grad_outputs, int[] kernel_size, int[] stride, int[] "
      "padding, int[] dilation, int groups, *, str form=\"auto\") -> Tensor");
  m.def(
      "embedding_grad_norm_sq(Tensor indices, Tensor grad_outputs, int padding_idx=-1) -> Tensor");
  m.def("affine_grad_norm_sq(Tensor normalized, Tensor grad_outputs) -> Tensor");
  m.def("bias_grad_norm_sq(Tensor grad_outputs) -> Tensor");
  m.def(
      "linear_weight_grad(Tensor activations, Tensor grad_outputs) -> (Tensor weight_grad, Tensor "
      "bias_grad, Tensor weight_norm_sq, Tensor bias_norm_sq)");
  m.def(
      "conv_weight_grad(Tensor input, Tensor grad_outputs, int[] kernel_size, int[] stride, int[] "
      "padding, int[] dilation, int groups) -> (Tensor weight_grad, Tensor bias_grad, Tensor "
      "weight_norm_sq, Tensor bias_norm_sq)");
  m.def(
      "weighted_sample(Tensor weights, SymInt n, Tensor seed, *, bool replacement=False) -> "
      "(Tensor "
      "indices, Tensor probs)");
  m.def(
      "neighbor_sample(Tensor table, Tensor anchors, Tensor anchor_weights, SymInt n, Tensor seed) "
      "-> (Tensor indices, Tensor probs)");
  m.def(
      "neighbor_probs(Tensor table, Tensor anchors, Tensor anchor_weights, Tensor ids) -> Tensor");
  m.def("knn(Tensor queries, Tensor data, SymInt k) -> (Tensor distances, Tensor indices)");
}
