//! Generates `include/uapi/linux/virtio_mshare.h` from `src/device.rs`.

use std::path::Path;

use cbindgen::{Config, DocumentationStyle, Language, Style};

/// The header's text.
pub fn generate() -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/device.rs");
    let mut config = Config {
        language: Language::C,
        style: Style::Tag,
        header: Some(
            "/* SPDX-License-Identifier: ((GPL-2.0 WITH Linux-syscall-note) OR BSD-3-Clause) */\n\
             /*\n \
              * virtio-mshare: regions of a host's pool, with their page tables.\n \
              *\n \
              * Generated from the Rust definition of the device; do not edit.\n \
              */"
            .to_owned(),
        ),
        include_guard: Some("_LINUX_VIRTIO_MSHARE_H".to_owned()),
        after_includes: Some("#include <linux/types.h>".to_owned()),
        no_includes: true,
        tab_width: 8,
        line_length: 80,
        documentation: true,
        documentation_style: DocumentationStyle::Doxy,
        ..Config::default()
    };
    config.export.include = [
        "virtio_mshare_config",
        "virtio_mshare_req",
        "virtio_mshare_resp",
        "virtio_mshare_list",
        "virtio_mshare_event",
        "virtio_mshare_ack",
    ]
    .map(str::to_owned)
    .to_vec();
    for (rust, c) in [("U32", "__le32"), ("U64", "__le64")] {
        config.export.rename.insert(rust.to_owned(), c.to_owned());
    }
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(source)
        .generate()
        .expect("device.rs is a source cbindgen understands");
    let mut bytes = Vec::new();
    bindings.write(&mut bytes);
    let text = String::from_utf8(bytes).expect("the header is text");
    kernel_style(&text)
}

/// Rewrites what cbindgen cannot be told: kernel types, tabs, names that are
/// keywords in Rust only, and Rust's links in comments.
fn kernel_style(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let body = line.trim_start_matches(' ');
        let indent = (line.len() - body.len()) / 8;
        let body = body
            .replace("/**", "/*")
            .replace("uint8_t ", "__u8 ")
            .replace(" type_;", " type;")
            .replace("[`", "")
            .replace("`]", "")
            .replace('`', "")
            .replace("virtio_mshare_req::", "virtio_mshare_req.");
        let extra = (line.len() - line.trim_start_matches(' ').len()) % 8;
        out.push_str(&"\t".repeat(indent));
        out.push_str(&" ".repeat(extra));
        out.push_str(&body);
        out.push('\n');
    }
    out
}
