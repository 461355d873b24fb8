//! Entry of the administration tool. Must never contain more than the call.

fn main() -> std::process::ExitCode {
    twistlock_ha::cli::main()
}
