//! The table of errnos in docs/system-calls.md against the manual pages, and
//! against the tests that it names.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use mshare_tests::selftests::list;

fn text(path: &str) -> String {
    let project = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    fs::read_to_string(project.join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The cells of each row of the table: errno, three kinds of calls, tests.
fn rows() -> Vec<[String; 5]> {
    let text = text("docs/system-calls.md");
    let rows: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("| E"))
        .map(|line| {
            let cells = line.trim_matches('|').split('|');
            let cells: Vec<_> = cells.map(|cell| cell.trim().to_owned()).collect();
            cells
                .try_into()
                .unwrap_or_else(|cells| panic!("{line}: {cells:?}"))
        })
        .collect();
    assert!(rows.len() > 10, "{rows:?}");
    rows
}

/// Errnos of the rows with something in that column.
fn in_column(column: usize) -> BTreeSet<String> {
    let rows = rows().into_iter();
    rows.filter(|row| !row[column].is_empty())
        .map(|row| row[0].clone())
        .collect()
}

/// Errnos of the section ERRORS.
fn of_page(path: &str) -> BTreeSet<String> {
    let text = text(path);
    let errors = text.split(".SH ").find(|part| part.starts_with("ERRORS"));
    let lines: Vec<_> = errors.unwrap().lines().collect();
    let tagged = lines.windows(2).filter(|pair| pair[0] == ".TP");
    tagged
        .map(|pair| pair[1].strip_prefix(".B ").unwrap().to_owned())
        .collect()
}

#[test]
fn table_and_manual_pages_have_the_same_errnos() {
    assert_eq!(in_column(1), of_page("docs/man/mshare.2"));
    assert_eq!(in_column(2), of_page("docs/man/mshare_unlink.2"));
}

#[test]
fn rows_and_pages_are_in_order_and_without_repetition() {
    let errnos: Vec<_> = rows().into_iter().map(|row| row[0].clone()).collect();
    assert!(errnos.is_sorted_by(|a, b| a < b), "{errnos:?}");
}

#[test]
fn tests_that_the_table_names_exist() {
    let guest_tests = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest"));
    let sources: String = fs::read_dir(guest_tests)
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    for [errno, .., tests] in rows() {
        let named: Vec<_> = tests.split('`').skip(1).step_by(2).collect();
        assert!(
            !named.is_empty() || tests.starts_with("none: "),
            "{errno}: {tests}"
        );
        for name in named {
            let is_selftest = list::ENTRIES.iter().any(|entry| entry.program == name);
            let is_guest_test = sources.contains(&format!("#[test]\nfn {name}()"));
            assert!(is_selftest || is_guest_test, "{errno}: no test {name}");
        }
    }
}
