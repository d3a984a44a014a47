"""`arrowquant bench`: which kernels this machine has, each with figures. What they are is not for a test to judge."""


def test_every_instruction_set_is_measured(cli):
    version = cli("version", "--json").json
    result = cli("bench", "--threads", "1", "--json", "--progress", "never")
    assert result.code == 0, result.err
    report = result.json
    assert report["schema"] == "arrowquant.bench/1" and report["isa"] == version["isa"] and report["threads"] == 1 and report["memcpy_gb_s"] > 0
    sets = {entry["isa"] for entry in report["kernels"]}
    assert {"scalar", version["isa"]} <= sets <= {"scalar", "avx2", "avx512", "neon"}
    assert len(report["kernels"]) == 5 * len(sets)
    for entry in report["kernels"]:
        assert entry["bits"] in (2, 4, 8) and entry["params"] in ("f16", "two-level")
        for figure in (entry["dequantize_gb_s"], entry["of_memcpy"], *entry["linear_1"].values(), *entry["linear_64"].values()):
            assert figure > 0


def test_the_table_names_what_it_shows(cli, tmp_path):
    result = cli("bench")
    assert result.code == 0 and "scalar" in result.out and "x memcpy" in result.out and "memcpy" in result.out.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    assert cli("bench", "somewhere").code == 2
