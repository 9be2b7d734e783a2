"""Ground floor: where artifacts are kept and how work reaches machines. Imports none of the other rooms."""
