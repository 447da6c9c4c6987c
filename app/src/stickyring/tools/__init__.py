"""The operator's commands on the controller: `stickyring probe`, `plan` and `whereis`."""
