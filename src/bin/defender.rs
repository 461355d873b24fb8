//! Entry of the Defender. Must never contain more than the call.

fn main() -> std::process::ExitCode {
    twistlock_ha::defender::main()
}
