"""LoRA and DoRA in the format of Hugging Face's peft, both ways and without peft.

A folder that PeftModel.from_pretrained takes has two files: adapter_config.json, which says what is
put where, and adapter_model.safetensors with the tensors, named as peft 0.21 names them:

    base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight           (r, in)
    base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight           (out, r)
    base_model.model.bert.encoder.layer.0.attention.self.query.lora_magnitude_vector   (out)  DoRA
    base_model.model.classifier.weight, ...bias       the head; of questions qa_outputs

peft's scale is alpha / r, too, or with use_rslora alpha / sqrt(r) (Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732). Whether the base was 4-bit is not in these files.
"""
import json
import math
import re

from methods import DEFAULT_TARGETS, HEAD, TARGETS, is_4bit, label_of, row_of
from settings import DEFAULT_MODEL
from start import fail

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, LAYERS = "base_model.model.", "bert.encoder.layer."
ENDS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
HUB_NAME = f"sentence-transformers/{DEFAULT_MODEL}"  # the same weights as fetch.py's
TASK_TYPES = {"classifier.": "SEQ_CLS", "qa_outputs.": "QUESTION_ANS"}  # by the head
# what peft's LoRA may have and ours has not
FOREIGN = ("rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "use_qalora",
           "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "revision")
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others change the frozen weights


def peft_name(name):
    """What peft calls one of our trained tensors."""
    for own, end in ENDS.items():
        if name.endswith("." + own):
            name = name.removesuffix(own) + end
    return PREFIX + name


def own_name(name):
    """What we call one of peft's."""
    name = name.removeprefix(PREFIX).replace("lora_magnitude_vector.weight",
                                             "lora_magnitude_vector")
    for own, end in ENDS.items():
        if name.endswith("." + end):
            name = name.removesuffix(end) + own
    return name


def make_config(s, names=()):
    """The content of adapter_config.json for a run with the settings `s`, whose trained tensors
    have these names."""
    row = row_of(s)
    if "r" not in row.flags:
        fail(f"{label_of(s)} has no place in peft's format of LoRA; --format merged exports what "
             "can be merged")
    has_questions = "stride" in s
    head = "qa_outputs" if has_questions else "classifier"
    return {"peft_type": "LORA", "task_type": TASK_TYPES[f"{head}."],
            "base_model_name_or_path": HUB_NAME if s["model"] == DEFAULT_MODEL else s["model"],
            "r": s["r"], "lora_alpha": s["alpha"], "lora_dropout": s["dropout"],
            "target_modules": list(TARGETS[s.get("targets", DEFAULT_TARGETS)]),
            "modules_to_save": [head,
                                # a new one, where the base has none
                                *["pooler"] * any(".pooler." in name for name in names)],
            "use_dora": "magnitude" in row.adds, "use_rslora": False, "bias": "none",
            "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True}


def read_config(folder):
    """adapter_config.json of a folder, if it is of a LoRA or DoRA that we have."""
    path = folder / CONFIG
    if not path.exists():
        fail(f"{folder} is no peft folder: {CONFIG} is not there")
    if not (folder / TENSORS).exists():
        fail(f"{folder} has no {TENSORS}; peft writes it with save_pretrained(folder, "
             "safe_serialization=True)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, r, alpha = config["peft_type"], config.get("r"), config.get("lora_alpha")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fail(f"{path} is damaged")
    if kind != "LORA":
        fail(f"{folder} is peft's {kind}; LoRA and DoRA alone are read")
    if not isinstance(r, int) or not isinstance(alpha, (int, float)) or r < 1 or alpha <= 0:
        fail(f"{path}: r is {r} and lora_alpha {alpha}")
    if config.get("task_type") not in (*TASK_TYPES.values(), None):
        fail(f"{folder} is for {config['task_type']}; {' and '.join(TASK_TYPES.values())} are read")
    if found := [key for key in FOREIGN if config.get(key)]:
        fail(f"{folder}: {found[0]} is not supported")
    if config.get("bias", "none") != "none":
        fail(f"{folder} trained biases (bias {config['bias']!r}), which is not supported")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        fail(f"{folder}: init_lora_weights {config['init_lora_weights']!r} changes the frozen "
             "weights, which is not supported")
    return config


def find_targets(folder, names):
    """Which of methods.TARGETS the tensors of these (peft's) names are on."""
    modules = {}  # of every layer the names of its linear layers
    for name in names:
        if name.endswith(".lora_A.weight"):
            found = re.fullmatch(re.escape(PREFIX + LAYERS) + r"(\d+)\.(.+)\.lora_A\.weight", name)
            if not found:
                where = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                fail(f"{folder}: LoRA is on {where}, which is not supported; on {LAYERS}* alone "
                     'it is (peft\'s "all-linear" takes the pooler, too)')
            modules.setdefault(int(found[1]), set()).add(found[2])
    for targets, own in TARGETS.items():
        if modules and all(found == set(own) for found in modules.values()):
            return targets
    least = min(modules.values(), key=len, default=set())
    fail(f"{folder}: LoRA is on {', '.join(sorted(least)) or 'nothing'} of a layer; every layer "
         f"must have it on one of: {'; '.join(TARGETS)}")


def make_about(folder, shapes, metadata):
    """What checkpoint.describe says of a run, told from a peft folder. shapes: {peft's name:
    shape}; metadata: that of the file, in which an export from here left what peft's files do not
    say."""
    config, targets = read_config(folder), find_targets(folder, shapes)
    heads = [head for head in HEAD if f"{PREFIX}{head}weight" in shapes]
    if len(heads) != 1:
        fail(f"{folder} has no head (classifier or qa_outputs, in peft's modules_to_save): what "
             "it answers is not in it")
    n_labels = shapes[f"{PREFIX}{heads[0]}weight"][0]
    has_questions = heads[0] == "qa_outputs."
    if config.get("task_type") not in (TASK_TYPES[heads[0]], None):
        fail(f"{folder} is for {config['task_type']}, but its head is {heads[0]}weight")
    if n_labels < 2:
        fail(f"{folder} has a head with one output, a regression's, which is not supported")
    try:
        known = {key: json.loads(value) for key, value in metadata.items() if key != "format"}
        before = known.get("settings", {})
        was_4bit = "method" in before and is_4bit(before)
    except (ValueError, KeyError, TypeError, AttributeError):
        known, before, was_4bit = {}, {}, False

    r, name = config["r"], config.get("base_model_name_or_path") or DEFAULT_MODEL
    s = {"model": DEFAULT_MODEL if name == HUB_NAME else name, "model_sha256": None,
         "max_length": 384 if has_questions else 128, "task": folder.resolve().name,
         "data_sha256": None, **({"stride": 128, "max_answer_length": 30} if has_questions else {}),
         **before,
         "method": ("q" if was_4bit else "") + ("dora" if config.get("use_dora") else "lora"),
         # s = alpha / sqrt(r) = (alpha sqrt(r)) / r
         "r": r, "alpha": config["lora_alpha"] * (math.sqrt(r) if config.get("use_rslora") else 1),
         "dropout": config.get("lora_dropout", 0.0), "placement": None, "bottleneck": None,
         "reduction": None}
    s.pop("targets", None)
    if targets != DEFAULT_TARGETS:
        s["targets"] = targets
    labels = None if has_questions else known.get("label_names")
    if not has_questions and (not labels or len(labels) != n_labels):
        labels = [f"LABEL_{i}" for i in range(n_labels)]  # as transformers calls them
    return {"settings": s, "label_names": labels, "base": known.get("base"),
            "tokenizer": known.get("tokenizer"), "pairs": known.get("pairs", False)}
