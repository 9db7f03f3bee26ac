"""Reports: tables, plots and pages about adapters and runs."""
