"""What the library `adapters` computes with the two kinds of adapters, as a file that
test_methods.py compares with. The library needs an older transformers than this project, so it
stands in an environment of its own:

    pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6
    python tests/adapters_reference.py        writes tests/adapters_reference.safetensors
"""
from pathlib import Path

import torch

CONFIG = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 32, "max_position_embeddings": 16}
BOTTLENECK = 4


def main():
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    import adapters
    # Houlsby's authors use tanh-GELU, where the library's default is swish
    kinds = {"houlsby": adapters.DoubleSeqBnConfig(reduction_factor=16 / BOTTLENECK,
                                                   non_linearity="gelu_new"),
             "pfeiffer": adapters.SeqBnConfig(reduction_factor=16 / BOTTLENECK)}
    torch.manual_seed(0)
    ids = torch.randint(0, 30, (3, 9))
    mask = (torch.arange(9) < torch.tensor([9, 7, 4])[:, None]).long()
    base = {name: torch.randn(p.shape).double() / 4 for name, p in
            BertModel(BertConfig(**CONFIG)).named_parameters()}
    kept = {"ids": ids, "mask": mask} | {f"base.{name}": p for name, p in base.items()}
    for kind, config in kinds.items():
        model = BertModel(BertConfig(**CONFIG)).double()
        model.load_state_dict(base, strict=False)
        adapters.init(model)
        model.add_adapter("it", config=config)
        model.set_active_adapters("it")
        own = {name: p for name, p in model.named_parameters() if ".adapters.it." in name}
        for name, p in own.items():
            p.data = torch.randn(p.shape).double() / 4
            kept[f"{kind}.{name}"] = p.data
        with torch.no_grad():
            kept[f"{kind}.out"] = model.eval()(ids, mask).last_hidden_state
    save_file({name: tensor.contiguous() for name, tensor in kept.items()},
              Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
