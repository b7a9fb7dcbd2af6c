"""What is made of finished runs: statistics over seeds, tables, figures, and the report.

Nothing here needs matplotlib but ``adapters.analysis.figures`` and the report.
"""
