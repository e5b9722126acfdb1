"""Case studies: questions that people ask, each run live and answered with its evidence.

caseN.run(say) runs one: `say` takes lines for people, the result is a dict with at least case, question,
answer, evidence. Subject programs are C sources in subjects/, compiled when a case runs.
"""
