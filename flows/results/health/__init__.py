"""Rules that say that a run learnt nothing, or less than it could.

`rules.RULES` is their table and `rules.findings` walks it over `figures.Figures`; what each of them looks at is in
`codes_and_losses` and in `images_and_samples`.
"""
