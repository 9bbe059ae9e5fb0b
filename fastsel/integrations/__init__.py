"""Choosing samples inside the training loops of other libraries.

Each module needs the library it is named after and says so when it is missing:

- `fastsel.integrations.accelerate`: `accelerated_step`, a `SelectiveStep` for Hugging Face
  Accelerate.
- `fastsel.integrations.lightning`: `SelectiveCallback`, which makes any LightningModule train on
  the chosen part of each batch.
- `fastsel.integrations.transformers`: `SelectiveTrainer`, and `SelectiveTrainerMixin` for other
  subclasses of the Hugging Face Trainer.
"""
