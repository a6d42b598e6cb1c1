"""The work items of a run: texts, scores, timings, facts about prompts."""
