"""The methods side by side: what is put into BERT, what trains, what is saved.

| method         | put into BERT                          | trains, and is saved            | equation    |
|----------------|----------------------------------------|---------------------------------|-------------|
| full           | nothing                                | everything                      |             |
| lora           | A, B beside query and value            | A, B, head                      | lora.py     |
| qlora          | NF4 encoder weights, then as lora      | A, B, head                      | quant.py    |
| adapter        |                                        |                                 |             |
|   houlsby      | two bottlenecks a layer                | bottlenecks, LayerNorms, head   | adapters.py |
|   pfeiffer     | one bottleneck a layer                 | bottlenecks, head               | adapters.py |

The head is the same nn.Linear on BERT's pooled [CLS] in all of them. The pooler is part of BERT: only `full` trains it.
"""
from adapters import inject_adapters
from lora import inject_lora
from settings import fail

# A parameter trains if its name contains one of these. Everything else is frozen.
TRAINS = {
    "full": ("",),
    "lora": ("lora_", "classifier."),
    "qlora": ("lora_", "classifier."),
    "houlsby": (".adapter.", ".LayerNorm.", "classifier."),
    "pfeiffer": (".adapter.", "classifier."),
}


def apply_method(model, s, compute_dtype):
    """Turn a fresh BertForSequenceClassification into the method of the settings `s`, in place.

    compute_dtype: the type in which 4-bit weights are multiplied. Draws from torch's global generator only after the
    head was made, so all methods start from the same head.
    """
    if s["method"] == "qlora":
        from quant import quantize_encoder  # bitsandbytes is slow to import and needed here only
        quantize_encoder(model, compute_dtype)
    if s["method"] in ("lora", "qlora"):
        inject_lora(model, s["r"], s["alpha"], s["dropout"])
    if s["method"] == "adapter":
        bottleneck = s["bottleneck"] or model.config.hidden_size // s["reduction"]
        if bottleneck < 1:
            fail(f"--reduction {s['reduction']} leaves no unit of a hidden size of {model.config.hidden_size}")
        inject_adapters(model, s["placement"], bottleneck)
    parts = TRAINS[s["placement"] or s["method"]]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    model.train(model.training)  # new modules start in training mode; the model may be in evaluation mode


def trained_tensors(model):
    """{name: parameter} of everything that trains: what the optimizer gets, what is saved, what is counted."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_params(model):
    """Numbers of parameters: the trainable ones by kind, and `total_params` with the frozen ones.

    4-bit weights are stored two to a byte, but counted as the weights they stand for.
    """
    def numel(p):
        return p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel()

    kinds = {"method": 0, "layer_norm": 0, "head": 0, "base": 0}
    for name, p in trained_tensors(model).items():
        kind = ("method" if "lora_" in name or ".adapter." in name else "head" if name.startswith("classifier.")
                else "layer_norm" if ".LayerNorm." in name else "base")
        kinds[kind] += p.numel()
    trainable, total = sum(kinds.values()), sum(numel(p) for p in model.parameters())
    return {"trainable_params": trainable, "trainable_by_kind": kinds, "total_params": total,
            "trainable_pct": 100 * trainable / total}
