"""Two examples of each command for its `--help`: the usual call, and one that shows what else it is good for.

They fit on a terminal of 80 columns.
"""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "kdcache build": (
        "kdcache build --teacher xlm-roberta-large --corpus text.txt",
        "kdcache build --teacher gpt2 --corpus text.txt --seq-len 256 --k 32",
    ),
    "kdcache plan": (
        "kdcache plan --teacher xlm-roberta-large --corpus text.txt",
        "kdcache plan --teacher gpt2 --corpus text.txt --precision nmse:1e-1 --json",
    ),
    "kdcache import": (
        "kdcache import answers.jsonl --tokenizer gpt2",
        "kdcache import parts --tokenizer gpt2 --k 32 --out imported.zarr",
    ),
    "kdcache derive": (
        "kdcache derive cache.zarr small.zarr --layers 2,4,6",
        "kdcache derive cache.zarr small.zarr --targets logits --max-rows 1000",
    ),
    "kdcache drop": (
        "kdcache drop cache.zarr --targets logits",
        "kdcache drop cache.zarr --extension 1 --json",
    ),
    "kdcache verify": (
        "kdcache verify cache.zarr",
        "kdcache verify cache.zarr --deep 16 --json",
    ),
    "kdcache info": (
        "kdcache info cache.zarr",
        "kdcache info s3://bucket/cache.zarr --json",
    ),
    "kdtrain": (
        "kdtrain --cache cache.zarr --method hs --out student",
        "kdtrain --method mha+hs --weights 1,0.1 --student 6x384 --resume auto",
    ),
    "kdeval fidelity": (
        "kdeval fidelity --student student --cache cache.zarr",
        "kdeval fidelity --student student --cache cache.zarr --exact --json",
    ),
    "kdeval finetune": (
        "kdeval finetune --student student --task sst2",
        "kdeval finetune --task sst2 --train-file train.tsv --dev-file dev.tsv",
    ),
    "kdeval perplexity": (
        "kdeval perplexity --student student --teacher gpt2 --text text.txt",
        "kdeval perplexity --text text.txt --seq-len 512 --max-tokens 100000",
    ),
    "kdeval lm-eval": (
        "kdeval lm-eval --student student --tasks hellaswag piqa --limit 100",
        "kdeval lm-eval --tasks animals --include-path tasks",
    ),
    "kdeval latency": (
        "kdeval latency --student student --teacher cache.zarr/teacher",
        "kdeval latency --batch-sizes 1,32 --lengths 128 --threads 1 --seconds 10",
    ),
    "kdeval trim": (
        "kdeval trim --student student --text text.txt --out small",
        "kdeval trim --text de.txt en.txt --coverage 0.9999 --out small --json",
    ),
    "kdeval export": (
        "kdeval export student --out published",
        "kdeval export student --out served --onnx --int8 both --cache cache.zarr",
    ),
    "kdeval compare": (
        "kdeval compare student student-mha --out comparison",
        "kdeval compare untrained student cache.zarr/teacher --baseline untrained",
    ),
    "kdeval report": (
        "kdeval report student --cache cache.zarr",
        "kdeval report student --out student.html",
    ),
}
"""By command."""
