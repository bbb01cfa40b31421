"""Chat templates of well-known model families, in short, with the special tokens that they need; a conversation."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin|>{% for m in messages %}<|start_header|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% else %}{{ raise_exception('no system turns') }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "<s>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}</s>\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ 'USER' if m.role == 'user' else 'ASSISTANT' }}: {{ m.content }}"
    "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Qwen 3 puts an empty thought before the last answer alone, and drops thoughts from earlier ones
QWEN3 = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ answer }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>"
    "{% endfor %}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_GENERATION_INNER = CHATML_GENERATION.replace(
    "{{ m.content }}<|im_end|>\n{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>\n"
)

# reasoning models: the generation prompt opens a thought, which earlier turns are written without
THINKER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# as Cohere writes answers: the token that ends the answer is not the one that ends the turn
COHERE = (
    "<s>{% for m in messages %}<|start_turn|>{% if m.role == 'assistant' %}<|chatbot|><|start_response|>{{ m.content }}"
    "<|end_response|>{% else %}{{ '<|user|>' if m.role == 'user' else '<|system|>' }}{{ m.content }}{% endif %}"
    "<|end_turn|>{% endfor %}{% if add_generation_prompt %}<|start_turn|><|chatbot|>{% endif %}"
)
# Mistral puts the system's turn before the last question
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% set last = (turns | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "<s>{% for m in turns %}{% if m.role == 'user' %}[INST] {{ system if m == last }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)

IM = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
# name → (template, special tokens, what ends an answer, texts that would open or end a turn)
FAMILIES = {
    "chatml": (CHATML, IM, "<|im_end|>", ["<|im_end|>", "<|im_start|>", "</s>"]),
    "chatml_generation": (CHATML_GENERATION, IM, "<|im_end|>", ["<|im_end|>", "<|im_start|>"]),
    "chatml_generation_inner": (CHATML_GENERATION_INNER, IM, "<|im_end|>", ["<|im_end|>"]),
    "qwen3": (QWEN3, IM, "<|im_end|>", ["<|im_end|>", "<|im_start|>"]),
    "llama3": (
        LLAMA3,
        ("<|begin|>", "</s>", "<|start_header|>", "<|end_header|>", "<|eot|>"),
        "<|eot|>",
        ["<|eot|>", "<|start_header|>"],
    ),
    "llama2": (LLAMA2, ("<s>", "</s>"), "</s>", ["</s>", "[INST]", "[/INST]"]),
    "gemma": (
        GEMMA,
        ("<s>", "</s>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        ["<end_of_turn>", "<start_of_turn>"],
    ),
    "zephyr": (ZEPHYR, ("<s>", "</s>"), "</s>", ["</s>", "<|user|>", "<|assistant|>", "<|system|>"]),
    "alpaca": (ALPACA, ("<s>", "</s>"), "</s>", ["</s>", "### Instruction:", "### Response:"]),
    "thinker": (THINKER, IM, "<|im_end|>", ["<|im_end|>", "<|im_start|>"]),
    "cohere": (
        COHERE,
        ("<s>", "</s>", "<|end_turn|>", "<|start_turn|>", "<|chatbot|>", "<|user|>", "<|end_response|>"),
        "<|end_turn|>",
        ["<|end_response|>", "<|end_turn|>", "<|start_turn|>", "<|system|>"],
    ),
    "mistral": (MISTRAL, ("<s>", "</s>"), "</s>", ["</s>", "[INST]", "[/INST]"]),
    "vicuna": (VICUNA, ("<s>", "</s>"), "</s>", ["</s>", "USER:", "ASSISTANT:"]),
}

TURNS = [
    {"role": "user", "content": "what is 1 + 1"},
    {"role": "assistant", "content": "the answer is 2."},
    {"role": "user", "content": "and 2 + 2"},
    {"role": "assistant", "content": "that is 4,\nof course."},
]
