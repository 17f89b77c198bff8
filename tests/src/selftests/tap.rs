//! Reads what a selftest prints: TAP 13 as kselftest writes it
//! (Documentation/dev-tools/ktap.rst). Strict: what a test program does not
//! say, or says twice, is a problem, not a success.

/// How a test ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// `ok`.
    Passed,
    /// `not ok`, or `ok` where a failure was announced (XPASS).
    Failed,
    /// `# SKIP`.
    Skipped,
    /// `# TODO` or `# XFAIL`: a failure that the program expects.
    Expected,
}

/// One test line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Test {
    /// What the program calls it, with the reason of a skip.
    pub name: String,
    /// How it ended.
    pub verdict: Verdict,
    /// The first comment before it that names a line of source: where a test that
    /// failed did so, and why.
    pub said: Option<String>,
}

/// Everything a program said, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Its tests.
    pub tests: Vec<Test>,
    /// How many tests it announced.
    pub plan: Option<u64>,
    /// Why it skipped everything: `1..0 # SKIP reason`.
    pub skipped: Option<String>,
    /// What is wrong with the report itself.
    pub problems: Vec<String>,
    /// What the next test said so far.
    said: Option<String>,
    version: bool,
    totals: Option<Vec<(String, u64)>>,
}

/// Status by which a kselftest program says that it skipped everything.
pub const STATUS_SKIP: u8 = 4;

/// Reads a program's output. `status` is what it exited with; `None` if it did
/// not come to that.
pub fn read<'a>(lines: impl IntoIterator<Item = &'a str>, status: Option<u8>) -> Report {
    let mut report = Report::default();
    for line in lines {
        report.line(line.trim_end());
    }
    report.finish(status);
    report
}

impl Report {
    /// How many tests ended this way.
    pub fn count(&self, verdict: Verdict) -> u64 {
        let found = self.tests.iter().filter(|test| test.verdict == verdict);
        found.count() as u64
    }

    fn problem(&mut self, text: impl Into<String>) {
        self.problems.push(text.into());
    }

    fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("not ok") {
            self.test(rest, false);
        } else if let Some(rest) = line.strip_prefix("ok") {
            self.test(rest, true);
        } else if let Some(plan) = line.strip_prefix("1..") {
            self.plan(plan);
        } else if line.starts_with("TAP version ") {
            if self.version {
                self.problem("a second TAP version line");
            } else if self.plan.is_some() || !self.tests.is_empty() {
                self.problem("the TAP version line is not the first");
            }
            self.version = true;
        } else if let Some(reason) = line.strip_prefix("Bail out!") {
            self.problem(format!("it bailed out:{reason}"));
        } else if let Some(totals) = line.strip_prefix("# Totals: ") {
            if self.totals.is_some() {
                self.problem("a second line of totals");
            }
            self.totals = Some(totals.split_whitespace().filter_map(total).collect());
        } else if let Some(comment) = line.strip_prefix('#')
            && self.said.is_none()
            && names_source(comment)
        {
            self.said = Some(comment.trim().to_owned());
        }
        // Anything else is what a helper process had to say.
    }

    fn plan(&mut self, text: &str) {
        let (count, rest) = text.split_once(' ').unwrap_or((text, ""));
        let Ok(count) = count.parse() else {
            self.problem(format!("a plan that is no number: 1..{text}"));
            return;
        };
        if self.plan.is_some() {
            self.problem("a second plan");
        }
        self.plan = Some(count);
        if let Some((word, reason)) = directive(rest)
            && word == "SKIP"
        {
            if count == 0 {
                self.skipped = Some(reason.to_owned());
            } else {
                self.problem("a plan that skips, but announces tests");
            }
        }
    }

    fn test(&mut self, rest: &str, ok: bool) {
        // "okay" is no test line.
        if !(rest.is_empty() || rest.starts_with(' ')) {
            return;
        }
        let rest = rest.trim_start();
        let (number, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let next = self.tests.len() as u64 + 1;
        match number.parse::<u64>() {
            Ok(number) if number == next => {}
            Ok(number) => self.problem(format!("test {number} where test {next} is due")),
            Err(_) => self.problem(format!("a test without a number where test {next} is due")),
        }
        let (name, directive) = match rest.find('#') {
            Some(at) => (&rest[..at], directive(&rest[at..])),
            None => (rest, None),
        };
        let name = name.trim().trim_start_matches("- ");
        let (word, reason) = directive.unwrap_or(("", ""));
        let verdict = match word {
            "SKIP" => Verdict::Skipped,
            "TODO" | "XFAIL" => Verdict::Expected,
            "XPASS" | "error" => Verdict::Failed,
            _ if ok => Verdict::Passed,
            _ => Verdict::Failed,
        };
        let name = match (name, reason, verdict) {
            ("", reason, _) => reason.to_owned(),
            (name, reason, Verdict::Skipped) => format!("{name}: {reason}"),
            (name, ..) => name.to_owned(),
        };
        let said = self.said.take();
        self.tests.push(Test {
            name,
            verdict,
            said,
        });
    }

    /// What shows only at the end.
    fn finish(&mut self, status: Option<u8>) {
        let count = self.tests.len() as u64;
        // kselftest prints none before it skips everything.
        if !self.version && self.skipped.is_none() {
            self.problem("no TAP version line");
        }
        match self.plan {
            None => self.problem("no plan"),
            Some(0) if self.skipped.is_none() => self.problem("a plan of no tests"),
            Some(plan) if plan != count => {
                let last = self.tests.last().map_or("none", |test| &test.name);
                let said = self.said.as_deref().unwrap_or("nothing");
                self.problem(format!(
                    "{plan} tests announced, {count} reported; the last is {last}, after it: {said}"
                ));
            }
            Some(_) => {}
        }
        self.check_totals();
        let failed = self.count(Verdict::Failed);
        match status {
            None => self.problem("it has no exit status"),
            Some(0) if failed > 0 => self.problem(format!("status 0 with {failed} failed tests")),
            Some(0) if self.skipped.is_some() => self.problem("status 0, but it skipped itself"),
            Some(STATUS_SKIP) if self.skipped.is_some() || self.last_skipped() => {}
            Some(status @ 1..) if failed == 0 => {
                self.problem(format!("status {status} without a failed test"));
            }
            Some(status @ 2..) => {
                self.problem(format!("status {status}: it did not come to its end"))
            }
            Some(_) => {}
        }
    }

    fn last_skipped(&self) -> bool {
        self.count(Verdict::Failed) == 0
            && self
                .tests
                .last()
                .is_some_and(|test| test.verdict == Verdict::Skipped)
    }

    /// kselftest's own count must be ours.
    fn check_totals(&mut self) {
        let Some(totals) = self.totals.take() else {
            return;
        };
        for (what, verdict) in [
            ("pass", Verdict::Passed),
            ("skip", Verdict::Skipped),
            ("xfail", Verdict::Expected),
        ] {
            let said = totals.iter().find(|(name, _)| name == what);
            let read = self.count(verdict);
            if let Some((_, said)) = said
                && *said != read
            {
                self.problem(format!("it counted {what}:{said}, but reported {read}"));
            }
        }
    }
}

/// Whether a comment begins with `FILE.c:LINE:`.
fn names_source(comment: &str) -> bool {
    let mut parts = comment.trim_start().split(':');
    parts.next().is_some_and(|file| file.ends_with(".c"))
        && parts.next().is_some_and(|line| line.parse::<u32>().is_ok())
}

/// `# WORD rest` as word and rest.
fn directive(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start().strip_prefix('#')?.trim_start();
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    // "SKIP:" and "skip" are found in the wild.
    let word = word.trim_end_matches(':');
    let known = ["SKIP", "TODO", "XFAIL", "XPASS", "error"];
    let word = known
        .into_iter()
        .find(|known| word.eq_ignore_ascii_case(known))?;
    Some((word, rest.trim()))
}

/// `pass:3` as its parts.
fn total(word: &str) -> Option<(String, u64)> {
    let (name, count) = word.split_once(':')?;
    Some((name.to_owned(), count.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "TAP version 13\n1..3\n# hello\nok 1 first\n# RUN x\nok 2 second\n\
        ok 3 third # SKIP no huge pages\n# Totals: pass:2 fail:0 xfail:0 xpass:0 skip:1 error:0\n";

    fn problems(text: &str, status: Option<u8>) -> Vec<String> {
        read(text.lines(), status).problems
    }

    /// Exactly one problem, with this text in it.
    #[track_caller]
    fn one(text: &str, status: Option<u8>, expected: &str) {
        let problems = problems(text, status);
        assert!(
            problems.len() == 1 && problems[0].contains(expected),
            "{problems:?}"
        );
    }

    #[test]
    fn good_report_has_no_problems() {
        let report = read(GOOD.lines(), Some(0));
        assert_eq!(report.problems, Vec::<String>::new());
        assert_eq!(report.count(Verdict::Passed), 2);
        assert_eq!(report.tests[2].name, "third: no huge pages");
        let crlf = GOOD.replace('\n', "\r\n");
        assert_eq!(read(crlf.split('\n'), Some(0)), report);
    }

    #[test]
    fn plan_may_come_last() {
        assert!(problems("TAP version 13\nok 1 a\n1..1\n", Some(0)).is_empty());
    }

    #[test]
    fn plan_is_missing_double_empty_or_wrong() {
        one("TAP version 13\nok 1 a\n", Some(0), "no plan");
        one(
            "TAP version 13\n1..1\nok 1 a\n1..1\n",
            Some(0),
            "second plan",
        );
        one("TAP version 13\n1..0\n", Some(0), "no tests");
        one(
            "TAP version 13\n1..2\nok 1 a\n",
            Some(0),
            "2 tests announced, 1",
        );
        one(
            "TAP version 13\n1..1\nok 1 a\nok 2 b\n",
            Some(0),
            "1 tests announced, 2",
        );
        assert!(!problems("TAP version 13\n1..x\nok 1 a\n", Some(0)).is_empty());
    }

    #[test]
    fn numbers_out_of_order_are_problems() {
        one(
            "TAP version 13\n1..2\nok 1 a\nok 1 a\n",
            Some(0),
            "where test 2",
        );
        one("TAP version 13\n1..1\nok 2 a\n", Some(0), "where test 1");
        one("TAP version 13\n1..1\nok\n", Some(0), "without a number");
    }

    #[test]
    fn status_must_agree_with_the_tests() {
        let failing = "TAP version 13\n1..1\nnot ok 1 a\n";
        assert!(problems(failing, Some(1)).is_empty());
        one(failing, Some(0), "status 0 with 1 failed");
        one(failing, Some(139), "did not come to its end");
        one(GOOD, Some(1), "status 1 without a failed");
        one(GOOD, Some(139), "status 139");
        one(GOOD, None, "no exit status");
    }

    #[test]
    fn skip_of_everything_is_status_4() {
        let all = "TAP version 13\n1..0 # SKIP no mshare\n";
        let report = read(all.lines(), Some(4));
        assert_eq!(report.problems, Vec::<String>::new());
        assert_eq!(report.skipped.as_deref(), Some("no mshare"));
        one(all, Some(0), "skipped itself");
        one("TAP version 13\n1..1\nok 1 a\n", Some(4), "status 4");
        assert!(problems("1..0 # SKIP no mshare\n", Some(4)).is_empty());
        let midway = "TAP version 13\n1..2\nok 1 a\nok 2 # SKIP no swap\n";
        assert!(problems(midway, Some(4)).is_empty());
    }

    #[test]
    fn directives_decide() {
        let text = "TAP version 13\n1..5\nok 1 # SKIP a\nnot ok 2 b # TODO later\n\
            ok 3 # XFAIL c\nok 4 # XPASS d\nnot ok 5 # error e\n";
        let verdicts: Vec<_> = read(text.lines(), Some(1))
            .tests
            .into_iter()
            .map(|test| (test.name, test.verdict))
            .collect();
        let expected = [
            ("a", Verdict::Skipped),
            ("b", Verdict::Expected),
            ("c", Verdict::Expected),
            ("d", Verdict::Failed),
            ("e", Verdict::Failed),
        ];
        assert_eq!(
            verdicts,
            expected.map(|(name, verdict)| (name.into(), verdict))
        );
    }

    #[test]
    fn failed_test_says_where() {
        let text = "TAP version 13\n1..3\n# a.c:7: 3 pages\nok 1 a\n# RUN b\n\
            # a.c:12: not so: x == 3\n# a.c:99: later\nnot ok 2 b\n# 1:2: no file\nnot ok 3 c\n";
        let report = read(text.lines(), Some(1));
        let said: Vec<_> = report.tests.iter().map(|test| &test.said).collect();
        let expected = [Some("a.c:7: 3 pages"), Some("a.c:12: not so: x == 3"), None];
        assert_eq!(
            said,
            expected.map(|text| text.map(str::to_owned)).each_ref()
        );
    }

    #[test]
    fn bail_out_and_wrong_totals_are_problems() {
        let bail = "TAP version 13\n1..1\nok 1 a\nBail out! no memory\n";
        one(bail, Some(0), "bailed out: no memory");
        let totals = "TAP version 13\n1..1\nok 1 a\n# Totals: pass:2 fail:0 skip:0\n";
        one(totals, Some(0), "pass:2");
    }

    #[test]
    fn words_that_only_begin_like_a_result_are_none() {
        let text = "TAP version 13\n1..1\nokay then\nok 1 a\nnot okay\n";
        assert!(problems(text, Some(0)).is_empty());
    }

    proptest! {
        #[test]
        fn any_output_is_read(text in any::<String>(), status in any::<Option<u8>>()) {
            read(text.lines(), status);
        }

        #[test]
        fn output_made_of_pieces_of_tap_is_read_and_never_counts_twice(
            pieces in proptest::collection::vec(
                prop_oneof![
                    Just("ok"), Just("not ok"), Just(" "), Just("\n"), Just("1.."), Just("#"),
                    Just("SKIP"), Just("TODO"), Just("18446744073709551616"), Just("1"),
                    Just("Bail out!"), Just("# Totals: "), Just("pass:"), Just("TAP version 13"),
                    Just("\u{85}"), Just("\r"), Just("é"),
                ],
                0..40,
            ),
            status in any::<Option<u8>>(),
        ) {
            let text = pieces.concat();
            let report = read(text.lines(), status);
            let lines = text.lines().count();
            prop_assert!(report.tests.len() <= lines);
        }

        #[test]
        fn report_cut_anywhere_before_its_last_test_has_a_problem(cut in 0..GOOD.len()) {
            let end = GOOD.find("ok 3").unwrap_or(0) + "ok 3".len();
            prop_assume!(cut < end);
            prop_assert!(!problems(&GOOD[..cut], Some(0)).is_empty());
        }
    }
}
