"""How weights and data travel: conversion, checks and publishing."""
