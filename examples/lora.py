"""LoRA: the same gradients but for rounding, with inputs of the adapters kept in 4 bits a number.

A Llama made from its configuration, with adapters of PEFT; nothing is downloaded.

python examples/lora.py --steps 30
"""

import copy

import peft
import torch
import transformers
from side_by_side import arguments, rows_of_step, show, take_turns, text

from memaop_triton import convert_, model_report

CONTEXT, BATCH, WIDTH = 64, 8, 256

args = arguments(__doc__, steps=20)
corpus = text()
alphabet = sorted(set(corpus))
number_of = {character: i for i, character in enumerate(alphabet)}
ids = torch.tensor([number_of[character] for character in corpus])

base = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=len(alphabet), hidden_size=WIDTH, intermediate_size=3 * WIDTH,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0,
    )
)  # fmt: skip
adapters = peft.LoraConfig(
    r=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
)
dense = peft.get_peft_model(base, adapters)
ours = convert_(copy.deepcopy(dense), targets="lora")  # the one line


def training(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)

    def step(number):
        starts = rows_of_step(number, len(ids) - CONTEXT, BATCH)
        batch = ids[starts[:, None] + torch.arange(CONTEXT)]
        torch.manual_seed(number)  # of dropout
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


show(take_turns(args.steps, dense=training(dense), converted=training(ours)))
# What a layer keeps of its inputs for the backward pass, and what a dense one would have kept.
print(model_report(ours))
