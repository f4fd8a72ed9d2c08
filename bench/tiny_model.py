"""A Qwen2 of two layers with random weights: a cheap engine, to measure the layers around it.

    python -m bench.tiny_model FOLDER

The vocabulary is trained on a few sentences, so that neither the output layer nor the sampler
takes the time. The text it generates is noise.
"""

import argparse
from pathlib import Path

VOCABULARY = 1024
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def architecture(
    hidden: int = 64, layers: int = 2, vocabulary: int = VOCABULARY
) -> dict[str, int | bool]:
    """The model's part of config.json."""
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write(
    folder: Path, hidden: int = 64, layers: int = 2, words: str = "", vocabulary: int = VOCABULARY
) -> Path:
    """Write config, weights and tokenizer to `folder`; the same bytes each time. Returns it.

    Args:
        hidden, layers: of the model.
        words: more text to train the vocabulary on. If it has room, each word is a token.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([__doc__ or "", words], trainer)
    torch.manual_seed(0)
    config = Qwen2Config(**architecture(hidden, layers, vocabulary))
    Qwen2ForCausalLM(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(write(parser.parse_args().folder))
