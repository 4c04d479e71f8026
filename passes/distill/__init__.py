"""Knowledge distillation: a student program is trained to match a teacher."""
