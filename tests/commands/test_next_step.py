import shlex

from lit_distill.commands.next_step import command_line, print_fit


def test_a_command_is_what_a_shell_takes_in_80_columns():
    arguments = ["fit", "--model.lora", "{r: 32}", "--data.metadata_path", "a folder/" + "x" * 40]
    found = command_line(arguments)
    assert shlex.split(found.replace("\\\n", " ")) == ["lit-distill", *arguments]
    assert len(found.splitlines()) == 2
    assert all(len(line) < 80 for line in found.splitlines())


def test_fit_is_named_with_the_configuration_or_with_the_pipeline(capsys):
    print_fit("a.csv", "some/pipeline", ["mine.yaml"])
    assert "lit-distill fit --config mine.yaml --data.metadata_path a.csv" in (
        capsys.readouterr().out
    )
    print_fit("a.csv", "some/pipeline")
    assert "--model.pretrained_model_name_or_path some/pipeline" in capsys.readouterr().out
    print_fit("a.csv", None)
    assert "lit-distill init --metadata_path a.csv" in capsys.readouterr().out
