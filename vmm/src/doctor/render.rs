//! The report as one screen of text.

use std::fmt;

use super::{Report, State};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
        for check in &self.checks {
            let mark = match check.state {
                State::Good => "ok  ",
                State::Fair => "fair",
                State::Bad => "BAD ",
            };
            writeln!(f, "{mark}  {:width$}  {}", check.name, check.found)?;
            if let Some(advice) = check.advice {
                writeln!(f, "{:4}  {:width$}  -> {advice}", "", "")?;
            }
        }
        let yes_no = |yes| if yes { "yes" } else { "no" };
        writeln!(
            f,
            "can boot Linux guests: {}; can share page tables: {}",
            yes_no(self.can_boot_linux),
            yes_no(self.shared_tables)
        )
    }
}
