package main

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// archive packs dir into a .tar.gz that depends on nothing but what is in the files: not on when, where and by whom they were made.
func archive(file, dir string, when time.Time) (retErr error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { retErr = errors.Join(retErr, f.Close()) }()
	zw := gzip.NewWriter(f)
	tw := tar.NewWriter(zw)
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error { // in the order of the names
		if err != nil {
			return err
		}
		name, err := filepath.Rel(filepath.Dir(dir), path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		h := &tar.Header{Name: filepath.ToSlash(name), Mode: 0o644, ModTime: when, Typeflag: tar.TypeReg, Size: info.Size(), Format: tar.FormatPAX}
		switch {
		case d.IsDir():
			h.Name, h.Mode, h.Typeflag, h.Size = h.Name+"/", 0o755, tar.TypeDir, 0
		case info.Mode()&0o111 != 0:
			h.Mode = 0o755
		}
		if err := tw.WriteHeader(h); err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		_, err = tw.Write(data)
		return err
	}); err != nil {
		return err
	}
	return errors.Join(tw.Close(), zw.Close())
}
