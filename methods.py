"""The methods side by side: what is put into BERT, what trains, what is saved.

| method         | put into BERT                          | trains, and is saved            | equation    |
|----------------|----------------------------------------|---------------------------------|-------------|
| full           | nothing                                | everything                      |             |
| lora           | A, B beside query and value            | A, B, head                      | lora.py     |
| qlora          | NF4 encoder weights, then as lora      | A, B, head                      | quant.py    |
| dora           | A, B, m beside query and value         | A, B, m, head                   | lora.py     |
| qdora          | NF4 encoder weights, then as dora      | A, B, m, head                   | both        |
| adapter        |                                        |                                 |             |
|   houlsby      | two bottlenecks a layer                | bottlenecks, LayerNorms, head   | adapters.py |
|   pfeiffer     | one bottleneck a layer                 | bottlenecks, head               | adapters.py |

The head is the same nn.Linear in all of them: on BERT's pooled [CLS] for sentences, on every token for questions (start
and end). The pooler is part of BERT: only `full` trains it, and question answering has none.
"""
from torch import nn

from adapters import inject_adapters
from lora import DoRALinear, LoRALinear, inject_lora
from settings import fail

# A parameter trains if its name contains one of these. Everything else is frozen.
HEAD = ("classifier.", "qa_outputs.")
TRAINS = {
    "full": ("",),
    "lora": ("lora_", *HEAD),
    "qlora": ("lora_", *HEAD),
    "dora": ("lora_", "magnitude", *HEAD),
    "qdora": ("lora_", "magnitude", *HEAD),
    "houlsby": (".adapter.", ".LayerNorm.", *HEAD),
    "pfeiffer": (".adapter.", *HEAD),
}


def replace_modules(root, kind, make):
    """Put make(module) in the place of every module in `root` that is exactly of the class `kind`."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if type(child) is kind:
                setattr(module, name, make(child))


def apply_method(model, s, compute_dtype):
    """Turn a fresh BertForSequenceClassification or BertForQuestionAnswering into the method of the settings `s`.

    compute_dtype: the type in which frozen weights are multiplied, autocast's or fp32. Draws from torch's global
    generator only after the head was made, so all methods start from the same head.
    """
    if s["method"] in ("qlora", "qdora"):
        from quant import quantize_encoder  # bitsandbytes is slow to import and needed here only
        quantize_encoder(model, compute_dtype)
    elif s["method"] != "full" and "half_weights" not in s.get("without", ()):
        # Autocast rounds a frozen weight to this type in every step, to the same bits: so once is enough. DoRA's norms
        # are then those of the rounded weight, which is the one that it multiplies by.
        for module in model.bert.encoder.modules():
            if isinstance(module, nn.Linear):
                module.to(compute_dtype)
    if s["method"] in ("lora", "qlora"):
        inject_lora(model, LoRALinear, s["r"], s["alpha"], s["dropout"])
    if s["method"] in ("dora", "qdora"):
        inject_lora(model, DoRALinear, s["r"], s["alpha"], s["dropout"])
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
        kind = ("head" if name.startswith(HEAD) else "layer_norm" if ".LayerNorm." in name
                else "method" if any(part in name for part in ("lora_", "magnitude", ".adapter.")) else "base")
        kinds[kind] += p.numel()
    trainable, total = sum(kinds.values()), sum(numel(p) for p in model.parameters())
    return {"trainable_params": trainable, "trainable_by_kind": kinds, "total_params": total,
            "trainable_pct": 100 * trainable / total}
