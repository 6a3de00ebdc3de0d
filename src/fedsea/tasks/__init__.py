"""The tasks that split models are fine-tuned and judged on: files in, records out, metrics.

`catalogue` names them; `superglue`, `glue`, `conversations` and `summaries` read the public formats;
`loading` makes `Record`s of what was read, by templates; `metrics` and `overlap` judge answers.
Nothing here knows a model or a tokenizer.
"""
