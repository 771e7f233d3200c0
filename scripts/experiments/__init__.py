"""What the commands on experiments share: plan and record, judging, comparators, another cohort."""
