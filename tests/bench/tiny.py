"""A tiny byte-level Llama with random weights, as a folder."""

import torch


def tokens(folder):
    """A tokenizer of byte pairs, with a token that begins every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    every = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=every)
    inner.train_from_iterator([__doc__, "def return self import the of and " * 20], trainer)
    start = ("<s>", inner.token_to_id("<s>"))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def llama(folder, *, layers=3, length=512, seed=0, bytewise=True):
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259 if bytewise else 400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        initializer_range=0.2,  # so that attention is far from even
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder) if bytewise else tokens(folder)
    return folder
