"""Evaluation with lmms-eval: the plugin, the paper's rules as tasks, results, the report.

    evaluate.py            a checkpoint or a model in memory; endpoint.py one behind a server, over HTTP
      runs.py              one task after another
      benchmarks.py        the eight benchmarks: their tasks, metrics and rules; tasks/ has those of ours
      few_shot.py          demonstrations in front of a question, for base models
      harness.py           lmms-eval's side: what a name means, loading a task, running it
      lmms_model.py        the model's side: batches, ranks, the journal; plugin.py shows it to lmms-eval's own command
        prompts.py         messages -> prompt -> tensors
        generation.py      loading a model, options of generate
        likelihood.py      losses of given answers
        journal.py         answers of a killed run
      results.py           results.json, samples/TASK.parquet, table.md, which report/ shows

lmms-eval takes many seconds to import: nothing here imports it before it is used.
"""
